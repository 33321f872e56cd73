"""E.9: no shred is carried out over a legal hold that has its receipt; the control variant, without the check, overruns one."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from sidecar import holds as flows
from sidecar import shredding
from sidecar.control import ControlPlane
from sidecar.core.command import receipt, receipt_id, stored
from sidecar.core.errors import CommandRejected, Conflict
from sidecar.core.model import Scope, ScopeKind
from sidecar.inbox import ControlRecord
from sidecar.kafka.admin import Admin
from sidecar.kafka.ledger import LedgerTopic
from sidecar.kafka.receipts import ViewWriter
from sidecar.ledger import Ledger
from sidecar.notices import Notices
from sidecar.postgres import audit, commands, holds, migrations, shreds, tenants
from sidecar.postgres.commands import Job
from sidecar.postgres.connection import Connection, Pool, connect, open_pool, transaction
from sidecar.residue import Residue
from sidecar.settings import load
from sidecar.shredding import Shredding
from sidecar.signing import control_signer
from sidecar.steps import Flow, Steps, SystemClock
from sidecar.testing import control_plane as kit
from sidecar.testing.local_stack import LocalStack

ACME = Scope.of_tenant("acme")
STREAM, OTHER_STREAM = (Scope(tenant="acme", kind=ScopeKind.STREAM, id=i) for i in ("a", "b"))
CLASS, OTHER_CLASS = (Scope(tenant="acme", kind=ScopeKind.CLASS, id=i) for i in ("C", "D"))
JANE, JOHN = (Scope(tenant="acme", kind=ScopeKind.SUBJECT, id=i) for i in ("jane", "john"))
SCOPES = (ACME, STREAM, OTHER_STREAM, CLASS, OTHER_CLASS, JANE, JOHN)

OVERLAPS = {
    ACME: set(SCOPES),
    STREAM: {ACME, STREAM, CLASS, JANE},
    OTHER_STREAM: {ACME, OTHER_STREAM, OTHER_CLASS, JOHN},
    CLASS: {ACME, STREAM, CLASS, JANE},
    OTHER_CLASS: {ACME, OTHER_STREAM, OTHER_CLASS, JOHN},
    JANE: {ACME, STREAM, CLASS, JANE},
    JOHN: {ACME, OTHER_STREAM, OTHER_CLASS, JOHN},
}


class Plane:
    """A control plane in this process, fed by hand."""

    def __init__(self, plane: Any, database: Connection, settings: Any) -> None:
        self._plane, self.database, self.settings = plane, database, settings

    async def send(self, op: str, scope: Scope, **changes: Any) -> UUID:
        command_id, value = kit.command(self.settings, op, scope, **changes)
        await self._plane.inbox.receive(ControlRecord(value=value, source=f"c/0/{command_id}"))
        return command_id

    async def receipt(self, command_id: UUID) -> dict[str, Any]:
        return await kit.final_receipt(self.database, command_id)

    async def carry_out(self, op: str, scope: Scope, **changes: Any) -> dict[str, Any]:
        return await self.receipt(await self.send(op, scope, **changes))


@asynccontextmanager
async def control_plane(stack: LocalStack, dsn: str, folder: Path, name: str) -> AsyncIterator[Plane]:
    settings = load(kit.write_config(folder, kit.document(name, stack.bootstrap_servers, dsn)))
    database = await connect(dsn)
    await migrations.migrate(database)

    async def nothing(*_: Any) -> None:
        return None

    plane = ControlPlane(settings, lead=nothing, follow=nothing)
    await plane.open()
    running = asyncio.create_task(plane.run())
    try:
        await asyncio.wait_for(plane.settled.wait(), 120)
        yield Plane(plane, database, settings)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await plane.close()
        await database.close()


@pytest.fixture
async def plane(local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]) -> AsyncIterator[Plane]:
    async with control_plane(local_stack, database, tmp_path, unique("h")) as here:
        yield here


async def seed(database: Connection) -> None:
    """Stream a of class C with a key of its own and events of Jane's, stream b of class D with John's."""
    await kit.seed(database, "acme", {"a": "C", "b": "D"})
    for person, stream in (("jane", "a"), ("john", "b")):
        key = uuid4()
        await database.execute(
            """INSERT INTO encryption_keys (tenant_id, key_id, scope_kind, scope_id, generation, kek_version, key_material, commitment)
               VALUES ('acme', $1, 'subject', $2, 1, 1, 'wrapped', 'commitment')""",
            key,
            person,
        )
        await database.execute("INSERT INTO stream_key_history VALUES ('acme', $2, $1, 1, 5)", key, stream)


async def overrun(database: Connection) -> list[str]:
    """The checker: tenants whose key was destroyed while a hold on them was in force."""
    rows = await database.fetch(
        """SELECT DISTINCT h.tenant_id FROM legal_holds h JOIN tenant_keys k USING (tenant_id)
           WHERE h.scope_kind = 'tenant' AND h.released_at IS NULL AND k.wrapped IS NULL"""
    )
    return [row["tenant_id"] for row in rows]


@pytest.mark.parametrize("held", SCOPES, ids=str)
async def test_a_hold_stands_in_the_way_of_every_scope_that_has_data_with_it(plane: Plane, held: Scope) -> None:
    await seed(plane.database)
    await kit.seed(plane.database, "zeta", {"a": "C", "b": "D"})
    placed = await plane.carry_out("hold", held)
    assert (placed["status"], placed["holds"]) == ("done", [placed["command_id"]])
    found = {scope for scope in SCOPES if await holds.overlapping(plane.database, scope)}
    assert found == OVERLAPS[held]
    elsewhere = [Scope(tenant="zeta", kind=s.kind, id="zeta" if s.kind is ScopeKind.TENANT else s.id) for s in SCOPES]
    assert [scope for scope in elsewhere if await holds.overlapping(plane.database, scope)] == []


async def test_e09_a_shred_over_a_hold_is_refused_with_the_reason_and_goes_through_after_the_release(plane: Plane) -> None:
    await seed(plane.database)
    placed = await plane.carry_out("hold", STREAM, reason="Case 7/26")
    for scope in (ACME, STREAM, CLASS):
        refused = await plane.carry_out("shred", scope)
        assert (refused["status"], refused["error"]["code"], refused["holds"]) == ("rejected", "legal_hold", placed["holds"])
        assert "Case 7/26" in refused["error"]["message"]
    assert await plane.database.fetchval("SELECT count(*) FROM encryption_keys WHERE key_material IS NULL") == 0
    assert await plane.database.fetchval("SELECT state FROM tenants") == "active"
    details = [r["details"] for r in await plane.database.fetch("SELECT details FROM audit_log WHERE action = 'command.rejected'")]
    assert [(d["error"], d["holds"]) for d in details] == [("legal_hold", placed["holds"])] * 3
    for wrong in ({"hold_id": str(uuid4())}, {}):
        assert (await plane.carry_out("release", ACME, options=wrong))["error"]["code"] == "unknown_hold"
    released = await plane.carry_out("release", ACME, options={"hold_id": placed["holds"][0]})
    assert (released["status"], released["holds"]) == ("done", placed["holds"])
    assert (await plane.carry_out("shred", ACME))["status"] == "inaccessible"
    assert await overrun(plane.database) == []
    actions = [r["action"] for r in await plane.database.fetch("SELECT action FROM audit_log ORDER BY seq")]
    assert [a for a in actions if not a.startswith("command.")] == ["hold.place", "hold.release", "tenant.shred"]
    assert [problem async for _, _, problem in audit.verify(plane.database)] == [None]


async def test_a_release_by_scope_ends_all_holds_on_just_that_scope(plane: Plane) -> None:
    await seed(plane.database)
    first, second, other = [await plane.carry_out("hold", scope) for scope in (STREAM, STREAM, CLASS)]
    released = await plane.carry_out("release", STREAM)
    assert set(released["holds"]) == {first["command_id"], second["command_id"]}
    assert [str(hold.hold_id) for hold in await holds.listed(plane.database)] == [other["command_id"]]
    assert len(await holds.listed(plane.database, released=True)) == 3


async def test_a_hold_on_what_is_gone_is_refused_and_one_within_the_grace_is_not(plane: Plane) -> None:
    """No receipt promises what nobody can keep."""
    await seed(plane.database)
    await kit.seed(plane.database, "acme", {"own": "C"})
    own = Scope(tenant="acme", kind=ScopeKind.STREAM, id="own")
    assert (await plane.carry_out("shred", own))["status"] == "inaccessible"
    assert (await plane.carry_out("hold", own))["error"]["code"] == "scope_erased"
    assert (await plane.carry_out("hold", STREAM))["status"] == "done"
    await kit.seed(plane.database, "zeta", {"a": "C"})
    zeta = Scope.of_tenant("zeta")
    assert (await plane.carry_out("shred", zeta))["status"] == "inaccessible"
    assert (await plane.carry_out("hold", zeta))["error"]["code"] == "tenant_shredded"
    await kit.seed(plane.database, "eta", {"a": "C"})
    eta = Scope.of_tenant("eta")
    assert (await plane.carry_out("shred", eta, options={"grace": "1h"}))["status"] == "inaccessible"
    assert (await plane.carry_out("hold", eta))["status"] == "done"
    assert len(await holds.overlapping(plane.database, eta)) == 1


async def test_a_hold_on_a_stream_whose_class_is_gone_is_refused(plane: Plane) -> None:
    await kit.seed(plane.database, "acme", {"own": "E", "other": "F"})
    assert (await plane.carry_out("shred", Scope(tenant="acme", kind=ScopeKind.CLASS, id="E")))["status"] == "inaccessible"
    assert (await plane.carry_out("hold", Scope(tenant="acme", kind=ScopeKind.STREAM, id="own")))["error"]["code"] == "scope_erased"
    assert (await plane.carry_out("hold", Scope(tenant="acme", kind=ScopeKind.STREAM, id="other")))["status"] == "done"


async def test_a_hold_on_a_tenant_that_is_gone_is_refused_although_the_grace_of_one_of_its_streams_lasts(plane: Plane) -> None:
    await kit.seed(plane.database, "acme", {"own": "E", "other": "F"})
    await plane.carry_out("shred", Scope(tenant="acme", kind=ScopeKind.STREAM, id="own"), options={"grace": "30d"})
    await plane.carry_out("shred", ACME, options={"grace": "1s"})
    async with asyncio.timeout(120):
        while await plane.database.fetchval("SELECT count(*) FROM quarantined_keys WHERE key_id IS NULL"):  # noqa: ASYNC110 (no event says so)
            await asyncio.sleep(0.05)
    assert await plane.database.fetchval("SELECT count(*) FROM quarantined_keys") == 1
    assert (await plane.carry_out("hold", ACME))["error"]["code"] == "tenant_shredded"


class Race:
    """A hold and a shred of one tenant, each in a process of its own as it were: neither waits in the other's queue."""

    def __init__(self, plane: Plane, pool: Pool) -> None:
        admin = Admin(plane.settings)
        ledger = Ledger(pool, LedgerTopic(plane.settings, admin), control_signer(plane.settings), plane.settings.deployment)
        steps = Steps(pool, admin, SystemClock(), ledger)
        self.plane, self._pool = plane, pool
        notices = Notices(pool, admin, ViewWriter(plane.settings))
        residue = Residue(plane.settings, steps, notices, lambda: None)  # type: ignore[arg-type,return-value]
        self._flows: dict[str, Flow] = {
            "hold": flows.Holding(steps),
            "shred": Shredding(plane.settings, steps, notices, residue),
        }

    async def run(self, op: str) -> str:
        """Up to the step that counts; -> done, or why not."""
        command_id, value = kit.command(self.plane.settings, op, ACME)
        command = stored(value)
        async with transaction(self._pool) as connection:
            body = receipt(receipt_id(command_id, "accepted"), command_id=command_id, op=op, scope=None, status="accepted")
            await commands.insert(
                connection, command_id=command_id, op=op, tenant="acme", payload=value, digest=b"", issuer="test", status="accepted", facts={},
                receipt=body, at=command.issued_at or SystemClock().now(),
            )  # fmt: skip
            job = Job(command_id=command_id, op=op, tenant="acme", payload=value, step=None, facts={}, received_at=SystemClock().now())
        while True:
            try:
                await self._flows[op].step(job, command)
                return "done"
            except CommandRejected as rejected:
                return rejected.code
            except Conflict:  # waited too long for the tenant's row: as the executor, try again
                await asyncio.sleep(0.05)

    async def second_comes_while_the_first_is_at(self, module: Any, name: str, first: str, second: str, monkeypatch: Any) -> tuple[str, str]:
        """`first` stops at module.name, inside of its transaction, until `second` is through or has waited for a while."""
        real, other = getattr(module, name), None

        async def slow(*arguments: Any, **named: Any) -> Any:
            nonlocal other
            if other is None:
                other = asyncio.create_task(self.run(second))
                await asyncio.wait({other}, timeout=2)
            return await real(*arguments, **named)

        monkeypatch.setattr(module, name, slow)
        outcome = await self.run(first)
        assert other is not None
        return outcome, await other


@pytest.fixture
async def race(local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]) -> AsyncIterator[Race]:
    """No executor runs: the test takes the steps."""
    settings = load(kit.write_config(tmp_path, kit.document(unique("h"), local_stack.bootstrap_servers, database)))
    connection, pool = await connect(database), await open_pool(database)
    await migrations.migrate(connection)
    await kit.seed(connection, "acme", {"a": "C"})
    yield Race(Plane(None, connection, settings), pool)
    await connection.close()
    await pool.close()


async def test_e09_a_shred_that_comes_while_a_hold_is_placed_waits_for_it_and_is_refused(race: Race, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await race.second_comes_while_the_first_is_at(holds, "place", "hold", "shred", monkeypatch) == ("done", "legal_hold")
    assert await overrun(race.plane.database) == []


async def test_e09_a_hold_that_comes_while_a_shred_is_carried_out_waits_for_it_and_is_refused(race: Race, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await race.second_comes_while_the_first_is_at(shreds, "take_keys", "shred", "hold", monkeypatch) == ("done", "tenant_shredded")
    assert await overrun(race.plane.database) == []


async def test_e09_control_a_hold_that_locks_nothing_is_overrun_by_a_shred(race: Race, monkeypatch: pytest.MonkeyPatch) -> None:
    """The race is a race: the same, with a hold that does not take the tenant's row."""

    @asynccontextmanager
    async def unlocked(steps: Steps, tenant: str) -> AsyncIterator[tuple[Connection, tenants.Tenant]]:
        async with transaction(steps.pool) as connection:
            yield connection, tenants.Tenant(state="active", generation=1, epoch=1)

    monkeypatch.setattr(flows, "_locked", unlocked)
    assert await race.second_comes_while_the_first_is_at(holds, "place", "hold", "shred", monkeypatch) == ("done", "done")
    assert await overrun(race.plane.database) == ["acme"]


async def test_e09_control_without_the_check_a_hold_is_overrun(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checker can go red: the same commands with a shred that does not look for holds."""

    async def blind(*_: Any) -> None:
        return None

    monkeypatch.setattr(shredding, "refuse_held", blind)
    await kit.seed(plane.database, "acme", {"a": "C"})
    assert (await plane.carry_out("hold", ACME))["status"] == "done"
    assert (await plane.carry_out("shred", ACME))["status"] == "inaccessible"
    assert await overrun(plane.database) == ["acme"]
