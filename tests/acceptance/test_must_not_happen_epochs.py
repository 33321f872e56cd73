"""What must not happen: 4 (a restored backup, and the seal epoch that takes its value), 8 (a disabled key counted as destroyed), 12 (a survivor lost).

Each checker is seen red on a variant that is broken on purpose.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from sidecar.core.errors import Conflict, SidecarError
from sidecar.core.keys import KekRow
from sidecar.core.kms import KmsVersion, VersionState
from sidecar.core.model import Event, Scope, ScopeKind
from sidecar.event_store import EventStore
from sidecar.kafka.ledger import LedgerTopic
from sidecar.keys import KeyManagement
from sidecar.kms import open_kms
from sidecar.kms.file import FileKms
from sidecar.ledger import LedgerGate
from sidecar.postgres import seal_epochs
from sidecar.postgres.connection import connect, open_pool
from sidecar.postgres.errors import mapped
from sidecar.sealing import Sealing
from tests.acceptance.rolls import backup, confirm_and_destroy, irrecoverable, opened_by_anybody, restore, roll, sealing, states, statuses, wrapped_by
from tests.acceptance.world import World, blocking, until

SECRETS = {"acme": 4, "globex": 4}


def stream_of(tenant: str, stream: str) -> Scope:
    return Scope(tenant=tenant, kind=ScopeKind.STREAM, id=stream)


def fill(world: World) -> None:
    world.run()
    for tenant, events in SECRETS.items():
        for n in range(events):
            world.event(world.topic("in"), f"{tenant} {n}".encode(), tenant=tenant, stream=f"aes-{n % 2}")
    world.settle()


# 4


@pytest.mark.parametrize("rolled", [True, False], ids=["after a roll", "control: without a roll"])
def test_04b_a_backup_from_before_the_roll_opens_nothing_with_the_kms_of_today(world: World, make_database: Callable[[], str], rolled: bool) -> None:
    fill(world)
    taken = backup(world.dsn)
    world.control()
    world.carry_out("shred", Scope.of_tenant("acme"))
    world.carry_out("shred", stream_of("globex", "aes-1"))
    if rolled:
        roll(world)
        confirm_and_destroy(world)
    restored = make_database()
    restore(restored, taken)
    found = opened_by_anybody(world, restored, world.dsn)
    everything = {("acme", "aes-0", 1), ("acme", "aes-0", 2), ("acme", "aes-1", 1), ("acme", "aes-1", 2)} | {
        ("globex", "aes-0", 1), ("globex", "aes-0", 2), ("globex", "aes-1", 1), ("globex", "aes-1", 2),
    }  # fmt: skip
    if not rolled:
        assert found == everything, "the checker opens what a backup opens"
        return
    assert found == {("globex", "aes-0", 1), ("globex", "aes-0", 2)}, "only what lives in the database of today"
    assert opened_by_anybody(world, restored) == set(), "the recovery point: the old backup alone opens nobody's data"
    assert statuses(world, "globex", stream="aes-0") == ["ok", "ok"]


def test_04b_a_backup_from_after_the_roll_opens_what_lived_then(world: World, make_database: Callable[[], str]) -> None:
    fill(world)
    world.control()
    world.carry_out("shred", stream_of("globex", "aes-1"))
    roll(world)
    taken = backup(world.dsn)
    confirm_and_destroy(world)
    restored = make_database()
    restore(restored, taken)
    assert opened_by_anybody(world, restored) == {(t, s, p) for t in SECRETS for s in ("aes-0", "aes-1") for p in (1, 2)} - {
        ("globex", "aes-1", 1),
        ("globex", "aes-1", 2),
    }


# 8


class Reluctant(FileKms):
    """Asked to destroy, it only says that the version is disabled, or scheduled; `let_go` does it in earnest."""

    def __init__(self, path: str, state: VersionState, at: datetime | None) -> None:
        super().__init__(path)
        self._answer, self.gives_in = (state, at), False

    async def destroy(self, key_version: str) -> KmsVersion:
        if self.gives_in:
            return await super().destroy(key_version)
        return KmsVersion(key_version=key_version, state=self._answer[0], irrecoverable_at=self._answer[1])

    async def version(self, key_version: str, **_: Any) -> KmsVersion:
        if self.gives_in:
            return await super().destroy(key_version)
        return await self.destroy(key_version)


SOON = datetime.now(UTC) + timedelta(days=7)
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
STATES = [(VersionState.DISABLED, None), (VersionState.DISABLED, LONG_AGO), (VersionState.PENDING, SOON), (VersionState.PENDING, LONG_AGO)]


def claims(world: World, receipt: dict[str, Any]) -> dict[str, Any]:
    """What the product says of the first epoch and of the shred of a tenant that was under it."""

    irrecoverable_at, reason = irrecoverable(world, receipt)
    row = world.sql("SELECT * FROM seal_epochs ORDER BY created_at LIMIT 1")[0]
    said = {"state": row["state"], "epoch": row["irrecoverable_at"], "destroyed_at": row["destroyed_at"], "shred": irrecoverable_at}
    return said | {"reason": reason}


NOTHING = {"state": "destroying", "epoch": None, "destroyed_at": None, "shred": None, "reason": "destruction in the KMS"}


@pytest.mark.parametrize(("state", "at"), STATES)
def test_08_a_version_that_is_not_destroyed_in_the_kms_never_counts_as_destroyed(world: World, state: VersionState, at: datetime | None) -> None:
    fill(world)
    world.control()
    receipt = world.carry_out("shred", Scope.of_tenant("acme"))
    kms = Reluctant(world.settings.kms.uri.removeprefix("file:"), state, at)
    roll(world, kms=kms)
    for _ in range(3):
        confirm_and_destroy(world, kms=kms)
        assert claims(world, receipt) == NOTHING
    kms.gives_in = True
    confirm_and_destroy(world, kms=kms)
    said = claims(world, receipt)
    assert (said["state"], said["reason"]) == ("destroyed", None)
    assert said["shred"] == said["epoch"] is not None


def test_08_control_a_roller_that_takes_disabled_for_destroyed_is_caught(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(world)
    world.control()
    receipt = world.carry_out("shred", Scope.of_tenant("acme"))
    kms = Reluctant(world.settings.kms.uri.removeprefix("file:"), VersionState.DISABLED, None)
    record = seal_epochs.record

    async def gullible(connection: Any, epoch: Any, found: KmsVersion, now: datetime) -> bool:
        return await record(connection, epoch, KmsVersion(key_version=found.key_version, state=VersionState.DESTROYED), now)

    monkeypatch.setattr(seal_epochs, "record", gullible)
    roll(world, kms=kms)
    confirm_and_destroy(world, kms=kms)
    assert claims(world, receipt) != NOTHING


# 12


class Arrivals:
    """New tenants, one after another, as long as the block lasts."""

    def __init__(self, world: World) -> None:
        self._world, self._ending = world, threading.Event()
        self.tenants: list[str] = []

    def _run(self) -> None:
        while not self._ending.wait(0.1):
            tenant = f"t{len(self.tenants)}"
            for stream in ("aes-1", "aes-2", "class-1"):
                self._world.event(self._world.topic("in"), tenant.encode(), tenant=tenant, stream=stream)
            self.tenants.append(tenant)

    def __enter__(self) -> "Arrivals":
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()


def keys(world: World, *words: str, failpoint: str | None = None) -> None:
    """`sidecar keys …` until it is done, or killed at its failpoint: what a slow broker cuts short goes on when it is called again."""
    environment = {"SIDECAR_TEST_FAILPOINT": failpoint} if failpoint else {}

    def ended() -> bool:
        said = world.cli("keys", *words, environment=environment)
        assert said.returncode in (0, 1, -9), said.stderr.decode()
        return said.returncode == (-9 if failpoint else 0)

    until(ended, f"keys {words} to end, at {failpoint}", 120)


def lost(world: World, tenants: list[str]) -> dict[str, Any]:
    """Tenants of which something that was not shredded cannot be read."""

    async def read() -> dict[str, Any]:
        pool = await open_pool(world.dsn)
        store = EventStore(pool, KeyManagement(open_kms(world.settings.kms.uri)), LedgerGate(LedgerTopic(world.settings), world.settings.deployment))
        out: dict[str, Any] = {}
        for tenant in tenants:
            try:
                found = {(row["stream_id"], type(held)) for row, held in await store.read(tenant) if row["stream_id"] != "aes-2"}
                if found != {("aes-1", Event), ("class-1", Event)}:
                    out[tenant] = found
            except SidecarError as error:
                out[tenant] = error
        await pool.close()
        return out

    return blocking(read)


def test_12_no_survivor_is_lost_in_rolls_that_are_killed_at_every_step_while_new_tenants_arrive(world: World) -> None:
    world.run()
    world.control()
    with Arrivals(world) as arrivals:
        until(lambda: len(arrivals.tenants) > 20, "the first tenants")
        until(lambda: len(wrapped_by(world)) > 10, "the first keys")
        for round_, failpoint in enumerate(
            ("roll:added", "roll:begun", "rekey:made", "rekey:moving", "rekey:moved", "roll:rewrapping", "roll:rewrapped")
        ):
            shredded = f"t{round_}"
            world.carry_out("shred", stream_of(shredded, "aes-2"))
            keys(world, "roll-epoch", failpoint=failpoint)
        keys(world, "roll-epoch")
        for failpoint in ("roll:destroying", "roll:destroyed"):
            keys(world, "confirm-backup", failpoint=failpoint)
            keys(world, "confirm-backup")
            keys(world, "roll-epoch")
        keys(world, "confirm-backup")
    world.settle()
    found = list(states(world).values())
    assert found.count("active") == 1
    assert set(found) == {"active", "destroyed"}
    assert found.count("destroyed") >= 4
    assert lost(world, arrivals.tenants) == {}
    assert statuses(world, "t0", stream="aes-2") == ["erased"]


WITHOUT_SHARE = """
CREATE OR REPLACE FUNCTION share_seal_epoch() RETURNS TRIGGER LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO seal_epochs (kms_uri, kms_key_version) VALUES (NEW.kms_uri, NEW.kms_key_version) ON CONFLICT DO NOTHING;
  IF NOT EXISTS (SELECT FROM seal_epochs e WHERE e.kms_uri = NEW.kms_uri AND e.kms_key_version = NEW.kms_key_version AND e.state = 'active') THEN
    RAISE EXCEPTION 'the seal epoch is over' USING ERRCODE = '40001';
  END IF;
  RETURN NEW;
END $$"""


async def wrapped_now(world: World, tenant: str) -> KekRow:
    """A new tenant's KEK under the version that wraps now, not stored yet."""
    return (await KeyManagement(open_kms(world.settings.kms.uri)).make_kek(tenant, 1))[1]


async def store(world: World, row: KekRow, before_commit: Callable[[], None] = lambda: None) -> str:
    """As a batch does it; "refused": it has to wrap again."""
    connection = await connect(world.dsn)
    try:
        with mapped():
            async with connection.transaction():
                await connection.execute("INSERT INTO tenants (tenant_id) VALUES ($1)", row.tenant)
                await connection.execute(seal_epochs.INSERT_KEK, *seal_epochs.kek_record(row))
                await asyncio.to_thread(before_commit)
        return "stored"
    except Conflict:
        return "refused"
    finally:
        await connection.close()


@contextmanager
def being_made(world: World, tenant: str) -> Iterator[Callable[[], None]]:
    """A batch that has stored a new tenant's KEK and has not committed yet; the function commits it."""
    opened, commit = threading.Event(), threading.Event()

    def hold() -> None:
        opened.set()
        commit.wait(120)

    async def main() -> None:
        assert await store(world, await wrapped_now(world, tenant), hold) == "stored"

    def finish() -> None:
        commit.set()
        thread.join()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert opened.wait(120)
    try:
        yield finish
    finally:
        finish()


def waits_for_a_lock(world: World) -> bool:
    return bool(world.value("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'a roller' AND wait_event_type = 'Lock'"))


@pytest.mark.parametrize("shares", [True, False], ids=["", "control: without FOR SHARE"])
def test_12_the_roller_waits_for_a_tenant_that_is_being_made(world: World, shares: bool) -> None:
    fill(world)
    if not shares:
        world.sql(WITHOUT_SHARE)
    (old,) = states(world)
    with being_made(world, "newcomer") as commit:
        roller = threading.Thread(target=lambda: (roll(world), confirm_and_destroy(world)))
        roller.start()
        until(lambda: waits_for_a_lock(world) or states(world)[old] == "destroyed", "the roller to wait, or to be done")
        commit()
        roller.join()
    assert states(world)[old] == "destroyed"
    assert (wrapped_by(world)["newcomer"] == old) is not shares, "under a version that is destroyed: lost"


@pytest.mark.parametrize("heeded", [True, False], ids=["", "control: nobody heeds `retiring`"])
def test_12_a_tenant_that_comes_behind_the_last_look_of_the_roller_is_sent_back(world: World, heeded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newcomer's KEK was wrapped before the roll, and is stored when the roller has found the old version empty."""
    fill(world)
    (old,) = states(world)
    if not heeded:
        world.sql("DROP TRIGGER seal_epoch ON tenant_keys")
    retire, newcomers = seal_epochs.retire, []

    async def behind_the_last_look(connection: Any, epoch: Any) -> bool:
        emptied = await retire(connection, epoch)
        newcomers.append(asyncio.create_task(store(world, before)))
        if not heeded:
            await newcomers[0]
        return emptied

    async def act(roller: Sealing) -> str:
        assert await roller.roll("a test")
        return await newcomers[0]

    before = blocking(lambda: wrapped_now(world, "newcomer"))
    monkeypatch.setattr(seal_epochs, "retire", behind_the_last_look)
    assert sealing(world, act) == ("refused" if heeded else "stored")
    assert states(world)[old] == "retired"
    assert ("newcomer" in wrapped_by(world)) is not heeded, "under a version that is about to be destroyed"
