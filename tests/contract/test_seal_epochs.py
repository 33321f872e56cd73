"""A roll on every KMS provider: what lives moves, what was wrapped before opens no more, or says that it still could."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sidecar.core.errors import KmsUnavailable, SidecarError
from sidecar.core.keys import KekRow
from sidecar.core.kms import VersionState
from sidecar.keys import KeyManagement, kek_row
from sidecar.postgres import migrations, seal_epochs
from sidecar.postgres.connection import Pool, connect, open_pool
from sidecar.sealing import Sealing
from sidecar.servers import KmsSettings
from sidecar.steps import SystemClock
from sidecar.testing.kms_conformance import Subject
from sidecar.testing.softhsm import SoftHsm
from tests.contract import kms_subjects

TENANTS = [f"t{n}" for n in range(20)]


@pytest.fixture(params=kms_subjects.NAMES)
async def subject(request: pytest.FixtureRequest, tmp_path: Path, softhsm: SoftHsm) -> AsyncIterator[Subject]:
    async with kms_subjects.all_of(tmp_path, softhsm)[request.param]() as opened:
        yield opened


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    connection = await connect(database)
    await migrations.migrate(connection)
    await connection.close()
    opened = await open_pool(database)
    yield opened
    await opened.close()


async def seed(pool: Pool, keys: KeyManagement) -> list[KekRow]:
    rows = [(await keys.make_kek(tenant, 1))[1] for tenant in TENANTS]
    async with pool.acquire() as connection:
        await connection.execute("INSERT INTO tenants (tenant_id) SELECT unnest($1::text[])", TENANTS)
        await connection.executemany(seal_epochs.INSERT_KEK, [seal_epochs.kek_record(row) for row in rows])
    return rows


async def openable(keys: KeyManagement, rows: list[KekRow]) -> set[str]:
    found = set()
    for row in rows:
        try:
            (await keys.open_kek(row)).destroy()
            found.add(row.tenant)
        except SidecarError:
            pass
    return found


async def test_what_lives_moves_and_the_old_version_is_destroyed_or_said_not_to_be(subject: Subject, pool: Pool) -> None:
    keys = KeyManagement(subject.kms)
    before = await seed(pool, keys)
    roller = Sealing(pool, SystemClock(), subject.open(), KmsSettings())
    assert await roller.roll("a test")
    async with pool.acquire() as connection:
        now = [kek_row(row) for row in await connection.fetch("SELECT * FROM tenant_keys")]
    old, new = before[0].kms_key_version, now[0].kms_key_version
    assert {row.kms_key_version for row in now} == {new} != {old}
    assert await openable(keys, now) == await openable(keys, before) == set(TENANTS), "both, until a backup is confirmed"

    for _ in range(2):
        await roller.confirm_backup(None, "a test")
        await roller.follow_up()
    async with pool.acquire() as connection:
        epoch = dict(await connection.fetchrow("SELECT * FROM seal_epochs WHERE kms_key_version = $1", old) or {})
    assert await openable(keys, now) == set(TENANTS)
    if subject.kms.traits.delay:
        assert (epoch["state"], epoch["irrecoverable_at"]) == ("destroying", None)
        assert epoch["destroy_expected_at"] is not None
        assert (await subject.kms.version(old)).state is VersionState.PENDING
    else:
        assert (epoch["state"], epoch["irrecoverable_at"] is None) == ("destroyed", False)
        assert await openable(keys, before) == set(), "a backup from before, with the KMS of today"


async def test_under_a_disabled_version_nothing_moves_and_nothing_is_given_up(subject: Subject, pool: Pool) -> None:
    """The roller cannot open what it must move. That is a KMS that is away, neither erased nor destroyed."""
    if subject.disable is None:
        assert subject.kms.traits.provider in ("file", "pkcs11"), "there is nothing between usable and destroyed"
        return
    (old, *_) = {row.kms_key_version for row in await seed(pool, KeyManagement(subject.kms))}
    await subject.kms.add_version()
    await subject.disable(subject.kms, old)
    roller = Sealing(pool, SystemClock(), subject.open(), KmsSettings())
    for _ in range(2):
        with pytest.raises(KmsUnavailable):
            await roller.roll("a test")
        await roller.confirm_backup(None, "a test")
    async with pool.acquire() as connection:
        rows = await connection.fetch("SELECT state, irrecoverable_at FROM seal_epochs ORDER BY created_at")
        assert [tuple(row) for row in rows] == [("retiring", None), ("active", None)]
        assert await connection.fetchval("SELECT count(wrapped) FROM tenant_keys") == len(TENANTS)
