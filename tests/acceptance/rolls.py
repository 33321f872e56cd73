"""The roller in the test's own process, and what a database from before it still opens."""

import io
import itertools
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

from sidecar.core.aead import lp
from sidecar.core.envelope import NO_FIELD, PREFIX_BYTES, event_aad, open_envelope, parse_header, stream_aad
from sidecar.core.errors import AuthenticationFailed, SidecarError
from sidecar.core.keys import Dek, DekRow, Kek
from sidecar.core.model import Scope, ScopeKind
from sidecar.keys import KeyManagement, dek_row, kek_row
from sidecar.kms import open_for
from sidecar.ports import Kms
from sidecar.postgres import migrations, seal_epochs
from sidecar.postgres.connection import connect, open_pool
from sidecar.sealing import Sealing
from sidecar.steps import SystemClock
from tests.acceptance.world import World, blocking

T = TypeVar("T")


def sealing(world: World, act: Callable[[Sealing], Awaitable[T]], *, kms: Kms | None = None, **settings: Any) -> T:
    """`act(sealing)`; `settings` replace some of kms.*"""

    async def main() -> T:
        pool = await open_pool(world.dsn, application_name="a roller", max_size=8)
        try:
            return await act(
                Sealing(pool, SystemClock(), kms or open_for(world.settings.kms, "control"), world.settings.kms.model_copy(update=settings))
            )
        finally:
            await pool.close()

    return blocking(main)


def roll(world: World, **more: Any) -> None:
    assert sealing(world, lambda s: s.roll("a test"), **more)


def confirm_and_destroy(world: World, **more: Any) -> None:
    async def act(roller: Sealing) -> None:
        await roller.confirm_backup(None, "a test")
        await roller.follow_up()

    sealing(world, act, **more)


def states(world: World) -> dict[str, str]:
    """version → state, oldest first."""
    return {row["kms_key_version"]: row["state"] for row in world.sql("SELECT * FROM seal_epochs ORDER BY created_at")}


def wrapped_by(world: World) -> dict[str, str]:
    """tenant → version of the KMS key under which its KEK is."""
    rows = world.sql("SELECT tenant_id, kms_key_version FROM tenant_keys WHERE wrapped IS NOT NULL ORDER BY kek_version")
    return {row["tenant_id"]: row["kms_key_version"] for row in rows}


def irrecoverable(world: World, receipt: dict[str, Any]) -> tuple[datetime | None, str | None]:
    """What the seal epochs say of a shred."""
    said = receipt["scope"]
    scope = Scope(tenant=said["tenant"], kind=ScopeKind(said["kind"]), id=said.get("id", ""))

    async def main() -> tuple[datetime | None, str | None]:
        connection = await connect(world.dsn)
        try:
            return await seal_epochs.irrecoverable(connection, scope, UUID(receipt["command_id"]))
        finally:
            await connection.close()

    return blocking(main)


def statuses(world: World, tenant: str, **of: Any) -> list[str]:
    return [event["status"] for event in world.events(tenant, **of)]


def backup(dsn: str) -> dict[str, bytes]:
    """Every table, as COPY gives it."""

    async def main() -> dict[str, bytes]:
        connection = await connect(dsn)
        try:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                out = {}
                for row in await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"):
                    content = io.BytesIO()
                    await connection.copy_from_table(row["tablename"], output=content, format="binary")
                    out[row["tablename"]] = content.getvalue()
                return out
        finally:
            await connection.close()

    return blocking(main)


def restore(dsn: str, taken: dict[str, bytes]) -> None:
    """Into an empty database. Triggers and foreign keys sleep, as with pg_restore."""

    async def main() -> None:
        connection = await connect(dsn)
        try:
            await migrations.migrate(connection)
            async with connection.transaction():
                await connection.execute("SET LOCAL session_replication_role = replica")
                await connection.execute(f"TRUNCATE {', '.join(taken)} CASCADE")
                for table, content in taken.items():
                    await connection.copy_to_table(table, source=io.BytesIO(content), format="binary")
        finally:
            await connection.close()

    blocking(main)


def opened_by_anybody(world: World, *dsns: str) -> set[tuple[str, str, int]]:
    """(tenant, stream, position) of every event that opens with what the KMS does today and with the key rows of all of these databases.

    Not a reader of ours, which heeds states and fences: every KEK is tried on every DEK, and every DEK on the events that name it.
    """

    async def main() -> set[tuple[str, str, int]]:
        keys = KeyManagement(open_for(world.settings.kms, "control"))
        keks: list[Kek] = []
        deks: list[DekRow] = []
        events: dict[tuple[str, str, int], Any] = {}
        for dsn in dsns:
            connection = await connect(dsn)
            for row in await connection.fetch("SELECT * FROM tenant_keys WHERE wrapped IS NOT NULL"):
                with suppress(SidecarError):
                    keks.append(await keys.open_kek(kek_row(row)))
            deks += [dek_row(row) for row in await connection.fetch("SELECT * FROM encryption_keys WHERE key_material IS NOT NULL")]
            for row in await connection.fetch("SELECT * FROM messages WHERE data_encrypted IS NOT NULL"):
                events[row["tenant_id"], row["stream_id"], row["stream_position"]] = row
            await connection.close()
        ciphers: dict[tuple[UUID, int], list[Dek]] = {}
        for dek, kek in itertools.product(deks, keks):
            if dek.name.scope.tenant == kek.tenant:
                with suppress(SidecarError):
                    assert dek.wrapped is not None
                    ciphers.setdefault((dek.name.key_id, dek.name.version), []).append(kek.unwrap(dek.wrapped, dek.name, dek.commitment))
        return {at for at, row in events.items() if _opens(row, ciphers)}

    return blocking(main)


def _opens(row: Any, deks: dict[tuple[UUID, int], list[Dek]]) -> bool:
    sealed = bytes(row["data_encrypted"])
    header = parse_header(sealed)
    stream = stream_aad(row["tenant_id"].encode(), row["stream_id"].encode())
    of_row = lp(row["message_id"].encode()), lp(row["message_type"].encode()), row["schema_version"]
    aad = event_aad(stream, row["stream_position"], *of_row, NO_FIELD, sealed[:PREFIX_BYTES])
    for dek in deks.get((header.key_id, header.key_version), ()):
        with suppress(AuthenticationFailed):
            return bool(open_envelope(header.suite.cipher(dek._secret), sealed, aad))
    return False
