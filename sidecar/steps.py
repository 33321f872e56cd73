"""What the flow of every command is made of: the guard, the letting go of instances, the audit row, the receipt.

A flow takes a command from step to step. Each step is one Postgres transaction that also moves `commands.step`, so it can be repeated.
Any error leaves the command where it was. Unavailable is worth another try, CommandRejected is final, the rest is the executor's to judge.
"""

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Any, Final, Protocol
from uuid import UUID

from sidecar import telemetry
from sidecar.core.audit import scope_ref
from sidecar.core.command import Command, receipt, receipt_id
from sidecar.core.keys import Keys
from sidecar.core.model import Scope
from sidecar.kafka.admin import Admin
from sidecar.ledger import Ledger
from sidecar.ports import Clock
from sidecar.postgres import audit, guard
from sidecar.postgres.commands import Job
from sidecar.postgres.connection import Connection, Pool, transaction
from sidecar.postgres.guard import Backend

WRITER: Final = "control-0"
FINISHED: Final = "done"


class Flow(Protocol):
    """One operation, step by step; `step` answers where the command then stands (FINISHED at the end)."""

    async def step(self, job: Job, command: Command) -> Job: ...


def failpoint(name: str) -> None:
    """Die here, as by SIGKILL, when a test asks for it."""
    if os.environ.get("SIDECAR_TEST_FAILPOINT") == name:
        os.kill(os.getpid(), signal.SIGKILL)


class Foreground:
    """Commands under way, before which the work behind them stands back: a scan of a topic takes a core, and a shred is waited for.

    Nobody stands back for good: after PATIENCE_SECONDS the work goes on all the same, piece by piece.
    """

    PATIENCE_SECONDS: Final = 1.0
    QUIET_SECONDS: Final = 0.25
    """Behind a command's last step its receipt is still to be published, and the next command often comes at once."""

    def __init__(self) -> None:
        self._under_way = 0
        self._quiet = threading.Event()
        self._quiet.set()
        self._soon: asyncio.TimerHandle | None = None

    @contextmanager
    def command(self) -> Iterator[None]:
        """One is under way. On the event loop's thread."""
        if self._soon is not None:
            self._soon.cancel()
        self._under_way += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._soon = asyncio.get_running_loop().call_later(self.QUIET_SECONDS, self._quiet.set)

    def stand_back(self) -> None:
        """Wait while one is. From a thread of the work's own: it blocks."""
        self._quiet.wait(self.PATIENCE_SECONDS)

    async def let_pass(self) -> None:
        """The same on the event loop."""
        until = time.monotonic() + self.PATIENCE_SECONDS
        while not self._quiet.is_set() and time.monotonic() < until:  # noqa: ASYNC110 (an event of threads, of which a waiting thread each would be too many)
            await asyncio.sleep(0.02)


class Steps:
    """Shared by the flows of one control process; keeps nothing that a restart would miss."""

    def __init__(self, pool: Pool, admin: Admin, clock: Clock, ledger: Ledger) -> None:
        self.pool, self.admin, self.clock, self.ledger = pool, admin, clock, ledger
        self.foreground = Foreground()
        self._evicted: dict[str, set[Backend]] = {}

    @asynccontextmanager
    async def under_guard(self, tenant: str) -> AsyncIterator[Connection]:
        """A transaction that holds the tenant's guard exclusively. Holders that do not let go in time lose their session."""
        async with guard.exclusively(self.pool, tenant, self._evicted.setdefault(tenant, set())) as connection:
            started = time.perf_counter()
            yield connection
        telemetry.guard_seconds.observe(time.perf_counter() - started)

    def terminated(self, tenant: str) -> dict[str, Any]:
        """As a fact of the step: their instances are fenced even while Postgres still lists the dead session."""
        return {"terminated": [[b.pid, b.started.isoformat()] for b in self._evicted.get(tenant, ())]}

    async def release(self, job: Job) -> list[dict[str, str]]:
        """What became of each instance: released (it let go, or holds nothing of ours), stopped, or fenced, here and now or before."""
        terminated = {Backend(pid, datetime.fromisoformat(started)) for pid, started in job.facts.get("terminated", ())}
        async with transaction(self.pool) as connection:
            found = await guard.instances(connection)
        lost = [i for i in found if i.state == "running" and (not i.alive or i.backend in terminated)]
        if lost:
            await asyncio.gather(*(asyncio.to_thread(self.admin.fence, i.transactional_id) for i in lost))
            async with transaction(self.pool) as connection:
                await guard.mark_fenced(connection, lost)
            telemetry.fenced.labels("instance").inc(len(lost))
            telemetry.log.warning(
                "instances fenced", extra={"action": "fence", "command_id": job.command_id, "instances": [i.instance_id for i in lost]}
            )
        gone = {i.instance_id for i in lost}
        outcome = {"running": "released", "stopped": "stopped", "fenced": "fenced"}
        return [{"instance_id": i.instance_id, "outcome": "fenced" if i.instance_id in gone else outcome[i.state]} for i in found]

    async def audited(self, connection: Connection, command: Command, action: str, keys: Keys | None = None, **facts: Any) -> dict[str, Any]:
        """The row of the act. A scope's id may be a person's name, so the trail holds its pseudonym; `command_id` leads to the rest."""
        return await self.note(connection, command.command_id, command.scope, action, command.requested_by, facts | (keys.in_audit() if keys else {}))

    async def note(
        self, connection: Connection, command_id: UUID, scope: Scope, action: str, actor: str, facts: dict[str, Any]
    ) -> dict[str, Any]:  # fmt: skip
        """As `audited`, of a command that only the ledger knows."""
        details = {"command_id": str(command_id), "scope": {"kind": scope.kind.value, "ref": scope_ref(scope).hex()}} | facts
        row = await audit.append(connection, writer=WRITER, at=self.clock.now(), action=action, actor=actor, tenant=scope.tenant, details=details)
        return {"audit": {"writer": row.writer, "seq": row.seq}}

    def receipt_of(self, job: Job, command: Command, status: Any, **facts: Any) -> dict[str, Any]:
        """The id comes from command and status: a step that is repeated repeats its receipt."""
        known = {"accepted_at": job.facts.get("accepted_at")} | {name: job.facts[name] for name in ("note",) if name in job.facts}
        identity = receipt_id(job.command_id, status)
        return receipt(identity, command_id=job.command_id, op=job.op, scope=command.scope.to_json(), status=status, **known, **facts)

    def settled(self, tenant: str) -> None:
        """The step that held the guard has committed, and remembers whom it evicted."""
        self._evicted.pop(tenant, None)


class SystemClock:
    """The machine's, in UTC."""

    def now(self) -> datetime:
        return datetime.now(UTC)
