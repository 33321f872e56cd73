"""The command path, free of Faust: receive into the inbox, carry out, publish receipts.

    Inbox      (inbox.py) a control record becomes a row of the inbox and a receipt in the outbox; after that it may be acked
    Executor   the one process that holds the deployment's lock works off the inbox: per tenant one after another, tenants side by side
    Outbox     publishes receipts in order; after a crash it looks on the topic for what was published, so none is there twice
    timers     put rotations that are due by age into the inbox, as commands of their own, and whatever else `_timers` lists

What cannot be reached is waited for, with growing pauses and for ever: nothing is lost, and no tenant waits for another's trouble.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, Final

import orjson

from sidecar import grace, telemetry
from sidecar.checkpoints import Checkpoints
from sidecar.clean_up import CleanUp
from sidecar.core.command import Command, receipt, receipt_id, stored
from sidecar.core.errors import CommandRejected, Conflict, KmsUnavailable, LedgerBehind, SidecarError, Unavailable
from sidecar.core.model import duration_ms
from sidecar.event_store import EventStore
from sidecar.evidence import Evidence
from sidecar.holds import Holding
from sidecar.inbox import Backoff, ControlRecord, Inbox, log_status, schedule_rotations
from sidecar.jobs import Jobs
from sidecar.kafka import jobs as jobs_topic
from sidecar.kafka import journal
from sidecar.kafka.admin import Admin
from sidecar.kafka.client import ProducerFenced
from sidecar.kafka.ledger import CONFIG, PARTITIONS, LedgerTopic
from sidecar.kafka.receipts import Outgoing, ReceiptPublisher, ViewWriter
from sidecar.keys import KeyManagement
from sidecar.kms import check_identity, open_for
from sidecar.ledger import Ledger, LedgerGate
from sidecar.ledger_replay import answer_asked
from sidecar.notices import Notices
from sidecar.ports import Clock
from sidecar.postgres import audit, commands, guard, ledger, migrations, readmissions
from sidecar.postgres.commands import Job, Unpublished
from sidecar.postgres.connection import Connection, Pool, connect, open_pool, refuse_transaction_pooling, transaction
from sidecar.postgres.durability import check_standby
from sidecar.postgres.guard import Backend
from sidecar.readmission import Readmission
from sidecar.rereading import Rereading
from sidecar.residue import Residue
from sidecar.rotation import Rotation
from sidecar.sealing import Sealing
from sidecar.settings import Settings
from sidecar.shredding import NOT_IN_LEDGER, Shredding
from sidecar.signing import control_signer
from sidecar.steps import FINISHED, WRITER, Flow, Foreground, Steps, SystemClock, failpoint

AT_ONCE: Final = 4
"""Commands carried out side by side, of different tenants."""
CLEAN_UP_SECONDS: Final = 86_400.0
POLL_SECONDS: Final = 1.0
"""How late a wake-up that got lost is made good."""
CERTIFY_SECONDS: Final = 2.0


class Executor:
    """Works off the inbox. One task per tenant that has something to do; at most AT_ONCE of them take a step at a time."""

    def __init__(self, pool: Pool, flows: Mapping[str, Flow], wake_outbox: Callable[[], None], foreground: Foreground) -> None:
        self._pool, self._flows, self._wake_outbox, self._foreground = pool, flows, wake_outbox, foreground
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._tenants: dict[str, asyncio.Task[None]] = {}
        self.wake = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled; then no step is under way any more."""
        try:
            while True:
                self.wake.clear()
                try:
                    async with transaction(self._pool) as connection:
                        waiting = await commands.tenants_waiting(connection)
                    for tenant in waiting:
                        if tenant not in self._tenants:
                            task = asyncio.create_task(self._work_off(tenant))
                            self._tenants[tenant] = task
                            task.add_done_callback(lambda _, name=tenant: self._finished(name))  # type: ignore[misc]
                except Unavailable as error:
                    telemetry.log.warning("executor waits", extra={"action": "execute", "error": error})
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):  # not wait_for: woken and cancelled at once, it would swallow the cancellation
                        await self.wake.wait()
        finally:
            tasks = list(self._tenants.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _finished(self, tenant: str) -> None:
        del self._tenants[tenant]
        self.wake.set()  # a command may have come after the last look

    async def _work_off(self, tenant: str) -> None:
        """All of a tenant's commands. After each step the choice is made anew, so that a shred need not wait for a rotation's retries."""
        backoff = Backoff()
        while True:
            try:
                async with self._slots:
                    async with transaction(self._pool) as connection:
                        job = await commands.next_job(connection, tenant)
                    if job is None:
                        return
                    with self._foreground.command():
                        await self._carry_out(job)
                backoff = Backoff()
                continue
            except (Unavailable, Conflict) as error:
                telemetry.retries.labels("command").inc()
                telemetry.log.warning("command waits", extra={"action": "execute", "tenant": tenant, "error": error})
            except Exception as error:
                # Nothing says that it can never be done, so it is never given up; the log says what stands in the way.
                telemetry.retries.labels("command").inc()
                telemetry.log.error("command fails", extra={"action": "execute", "tenant": tenant}, exc_info=error)
            await backoff.wait()

    async def _carry_out(self, job: Job) -> None:
        try:
            command = stored(job.payload)
        except CommandRejected as error:
            return await self._give_up(job, error, "failed", None)
        if await self._carried_out_before(job, command):
            known = CommandRejected("carried_out_before", "the ledger has this command: it was carried out before the database was restored")
            return await self._give_up(job, known, "rejected", command)
        while job.step != FINISHED:
            before = job
            try:
                job = await self._flow(job).step(job, command)
            except CommandRejected as error:
                return await self._give_up(before, error, "rejected", command)
            if job.step in ("inaccessible", FINISHED):
                self._wake_outbox()
            if job.step == before.step:
                return  # one of many chunks: other tenants want the slot too
        status = {"shred": "done" if command.dry_run else "inaccessible", "reencrypt": "accepted"}.get(job.op, "done")
        self._settled(job, status)

    async def _carried_out_before(self, job: Job, command: Command) -> bool:
        """A restored database knows nothing of it, or has it still to do: again, it would undo what came since, say a readmission."""
        async with transaction(self._pool) as connection:
            if job.step in NOT_IN_LEDGER:
                return await ledger.knows(connection, job.command_id)
            return job.op == "shred" and not await readmissions.stays_shredded(connection, command.scope, job.command_id)

    def _flow(self, job: Job) -> Flow:
        if job.op not in self._flows:
            raise CommandRejected("unsupported_op", f"this release does not carry out {job.op}")
        return self._flows[job.op]

    async def _give_up(self, job: Job, error: CommandRejected, status: Any, command: Command | None) -> None:
        """The command is refused by what it found (or can no longer be read): a receipt says so, nothing was changed."""
        scope = command.scope.to_json() if command else None
        identity = receipt_id(job.command_id, status)
        body = receipt(
            identity, command_id=job.command_id, op=job.op, scope=scope, status=status, error=error,
            accepted_at=job.facts.get("accepted_at"), **error.facts,
        )  # fmt: skip
        async with transaction(self._pool) as connection:
            await commands.advance(connection, job, FINISHED, receipt=body, finished=True)
            details = {"command_id": str(job.command_id), "op": job.op, "error": error.code} | error.facts
            now = datetime.now(job.received_at.tzinfo)
            await audit.append(connection, writer=WRITER, at=now, action=f"command.{status}", actor=WRITER, tenant=job.tenant, details=details)
        self._wake_outbox()
        self._settled(job, status, error)

    def _settled(self, job: Job, status: str, error: CommandRejected | None = None) -> None:
        seconds = (datetime.now(job.received_at.tzinfo) - job.received_at).total_seconds()
        telemetry.command_seconds.labels(job.op).observe(max(0.0, seconds))
        log_status(job.op, status, job.command_id, error)


class Outbox:
    """Publishes receipts in the order of their steps, each once."""

    def __init__(self, pool: Pool, publisher: ReceiptPublisher) -> None:
        self._pool, self._publisher = pool, publisher
        self.wake = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled. Raises ProducerFenced when another process publishes: then this one is not the executor any more."""
        backoff = Backoff()
        try:
            while True:
                self.wake.clear()
                try:
                    if await self._publish():
                        continue
                    backoff = Backoff()
                except (Unavailable, Conflict) as error:
                    # The outcome may be unknown: the next attempt looks on the topic first.
                    self._publisher.close()
                    telemetry.retries.labels("outbox").inc()
                    telemetry.log.warning("outbox waits", extra={"action": "publish", "error": error})
                    await backoff.wait()
                    continue
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):  # not wait_for: woken and cancelled at once, it would swallow the cancellation
                        await self.wake.wait()
        finally:
            self._publisher.close()

    async def _publish(self) -> bool:
        """True if there may be more."""
        async with transaction(self._pool) as connection:
            waiting = await commands.unpublished(connection)
        if not waiting:
            return False
        there: set[Any] = set()
        if not self._publisher.is_open:
            await asyncio.to_thread(self._publisher.open)
            # A minute for clocks that differ between Postgres and the broker.
            there = await asyncio.to_thread(self._publisher.already_published, waiting[0].created_at - timedelta(minutes=1))
        missing = [row for row in waiting if row.outbox_id not in there]
        if missing:
            await asyncio.to_thread(self._publisher.publish, [_outgoing(row) for row in missing])
        failpoint(f"published:{waiting[-1].body['status']}")
        async with transaction(self._pool) as connection:
            await commands.mark_published(connection, [row.outbox_id for row in waiting])
        for row in missing:
            telemetry.receipts.labels(row.body["status"]).inc()
        return True


def _outgoing(row: Unpublished) -> Outgoing:
    key = str(row.command_id).encode() if row.command_id else None
    return Outgoing(outbox_id=row.outbox_id, key=key, value=orjson.dumps(row.body))


class ControlPlane:
    """Holds the deployment's lock and runs executor, outbox and timer while it does; `lead` and `follow` start and stop the receiving.

    A second process stands by, at no cost, and takes over when the first one's session ends.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        lead: Callable[["ControlPlane"], Awaitable[None]],
        follow: Callable[[], Awaitable[None]],
        clock: Clock | None = None,
        timer_seconds: float = 60.0,
    ) -> None:
        self._settings, self._lead, self._follow = settings, lead, follow
        self._clock, self._timer_seconds = clock or SystemClock(), timer_seconds
        self._state = "starting"
        self._trouble: str | None = None
        self._own: Backend | None = None
        self._opened = False
        self._executor: Executor | None = None
        self._outbox: Outbox | None = None
        self.settled = asyncio.Event()
        """Set once it leads, or knows that it stands by."""

    async def open(self) -> None:
        """Reach Postgres and Kafka once, check both, make the topics. Raises ConfigurationError or Unavailable."""
        control_signer(self._settings)  # there, or made now, or no start
        self.kms = open_for(self._settings.kms, "control")
        try:
            await check_identity(self.kms, "control", production=self._settings.profile == "production")
        except KmsUnavailable as error:
            # A shred makes data inaccessible without it; what needs it waits for it.
            telemetry.log.warning("the KMS is away: its rights are not checked", extra={"action": "start", "error": error})
        dsn = self._settings.postgres.for_role("control")
        connection = await connect(dsn, application_name="sidecar control start")
        try:
            await migrations.check_or_migrate(connection, may_migrate=self._settings.profile == "development")
            await refuse_transaction_pooling(connection)
            await check_standby(connection, production=self._settings.profile == "production")
        finally:
            await connection.close()
        self._admin = Admin(self._settings)
        self._signer = control_signer(self._settings)
        self._ledger_topic = LedgerTopic(self._settings, self._admin)
        self._gate = LedgerGate(self._ledger_topic, self._settings.deployment, records=True)
        await asyncio.to_thread(create_topics, self._admin, self._settings)
        await asyncio.to_thread(self._ledger_topic.refuse_retention)
        self._pool = await open_pool(dsn, application_name="sidecar control", max_size=AT_ONCE * 2 + 4)
        self._writer = ViewWriter(self._settings)
        self._checkpoints = Checkpoints(self._settings, self._pool, self._signer, self._writer, self._clock)
        store = EventStore(self._pool, KeyManagement(self.kms), self._gate)
        self._evidence = Evidence(self._settings, self._pool, self._signer, store, self._clock)
        self.inbox = Inbox(self._settings, self._pool, self._clock, self._wake_executor)
        self._rereading = Rereading(self._settings, self._pool, self._admin, self.inbox, self._clock)
        self._opened = True

    async def close(self) -> None:
        if not self._opened:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(5):
                await self._pool.close()
        self._pool.terminate()

    async def receive(self, records: list[ControlRecord]) -> None:
        """Of the control topic: they may be acked when it comes back."""
        await self.inbox.receive(*records)
        await self._rereading.remember(records)

    def ready(self) -> tuple[bool, str]:
        """Serves when it leads and can be reached; standing by is its proper state too, so that a roll-out need not wait."""
        if self._trouble is not None:
            return False, self._trouble
        return self._state in ("active", "standby"), self._state

    def _wake_executor(self) -> None:
        if self._executor is not None:
            self._executor.wake.set()
        self._wake_outbox()

    def _wake_outbox(self) -> None:
        if self._outbox is not None:
            self._outbox.wake.set()

    async def run(self) -> None:
        """Until cancelled: wait for the lock, lead while the session that holds it lives, and again."""
        leading = False
        backoff = Backoff()
        try:
            while True:
                try:
                    connection = await self._take_lead()
                    if connection is None:
                        if leading:
                            await self._follow()
                            leading = False
                        self._state, self._trouble = "standby", None
                        self.settled.set()
                        await asyncio.sleep(POLL_SECONDS)
                        continue
                    try:
                        await self._gate.check(connection)
                        if not leading:
                            await self._rereading.take_again()
                            await self._lead(self)
                            leading = True
                        backoff = Backoff()
                        await self._work(connection)
                    finally:
                        connection.terminate()
                except ProducerFenced as error:
                    telemetry.log.warning("another process publishes", extra={"action": "lead", "error": error})
                except Unavailable as error:
                    self._trouble = str(error)
                    telemetry.log.warning("control waits", extra={"action": "lead", "error": error})
                    if leading and isinstance(error, LedgerBehind):
                        await self._follow()  # commands are for a database that is served
                        leading = False
                    await backoff.wait()
        finally:
            self._state = "stopped"
            if leading:
                await self._follow()

    async def _take_lead(self) -> Connection | None:
        connection = await connect(self._settings.postgres.for_role("control"), application_name="sidecar control lead", command_timeout=10)
        try:
            if self._own is not None:
                await guard.end_session(connection, self._own)
                self._own = None
            self._own = await guard.try_lead(connection, self._settings.deployment)
        except BaseException:
            connection.terminate()
            raise
        if self._own is None:
            await connection.close()
            return None
        return connection

    async def _work(self, lock: Connection) -> None:
        """Executor, outbox, timer; returns when the session of the lock is gone, raises what one of them raises."""
        ledger = Ledger(self._pool, self._ledger_topic, self._signer, self._settings.deployment)
        self._steps = steps = Steps(self._pool, self._admin, self._clock, ledger)
        notices = Notices(self._pool, self._admin, self._writer)
        self._foreground = steps.foreground
        self._residue = Residue(self._settings, steps, notices, self._sealing)
        self._jobs = Jobs(self._settings, steps)
        flows: dict[str, Flow] = {
            "shred": Shredding(self._settings, steps, notices, self._residue),
            "rotate": Rotation(steps),
            "hold": Holding(steps),
            "release": Holding(steps),
            "reencrypt": self._jobs,
            "readmit": Readmission(steps, self._sealing().renew_dedicated),
        }
        self._outbox = Outbox(self._pool, ReceiptPublisher(self._settings))
        self._executor = Executor(self._pool, flows, self._wake_outbox, steps.foreground)
        await lock.add_listener(commands.CHANNEL, lambda *_: self._wake_executor())
        timers = [self._again(name, seconds, act) for name, (seconds, act) in self._timers().items()]
        work = [self._executor.run(), self._outbox.run(), self._watch(lock), *timers]
        tasks = [asyncio.create_task(part) for part in work]
        self._state, self._trouble = "active", None
        self.settled.set()
        telemetry.log.info("leads", extra={"action": "lead", "deployment": self._settings.deployment})
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._state = "starting"
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._executor = self._outbox = None

    async def _watch(self, lock: Connection) -> None:
        """Returns when the session is gone: from then on somebody else may lead."""
        while not lock.is_closed():
            try:
                await lock.fetchval("SELECT 1", timeout=5)
                self._trouble = None
            except Exception as error:
                self._trouble = "Postgres does not answer"
                telemetry.log.warning("the lead is lost", extra={"action": "lead", "error": error})
                return
            await asyncio.sleep(0.5)

    def _timers(self) -> dict[str, tuple[float, Callable[[], Awaitable[object]]]]:
        """What is done again and again while leading: name → seconds between, and what. Each runs in a task of its own."""
        return {
            "rotate": (self._timer_seconds, self._rotate_what_is_due),
            "seal_epochs": (self._timer_seconds, self._roll_what_is_due),
            "clean_up": (CLEAN_UP_SECONDS, self._clean_up_what_is_due),
            "checkpoint": (duration_ms(self._settings.audit.checkpoint_every) / 1000, self._checkpoints.sign),
            "residue": (POLL_SECONDS, self._look_at_residue),
            "grace": (self._timer_seconds, lambda: grace.destroy_unwatched(self._steps)),
            "ledger": (POLL_SECONDS, lambda: answer_asked(self._pool, self._clock)),
            "jobs": (POLL_SECONDS, self._follow_up_jobs),
            "certify": (CERTIFY_SECONDS, self._certify),
        }

    async def _certify(self) -> None:
        await self._evidence.issue(self._foreground.let_pass)

    async def _look_at_residue(self) -> None:
        await self._residue.work()
        self._wake_outbox()

    async def _follow_up_jobs(self) -> None:
        await self._jobs.follow_up()
        self._wake_outbox()

    async def _rotate_what_is_due(self) -> None:
        if await schedule_rotations(self._settings, self._pool, self._clock):
            self._wake_executor()

    async def _clean_up_what_is_due(self) -> None:
        if (after := self._settings.control.clean_up_after) != "off":
            await CleanUp(self._pool, self._clock).run(older_than=timedelta(milliseconds=duration_ms(after)))

    async def _roll_what_is_due(self) -> None:
        await self._sealing().follow_up()

    def _sealing(self) -> Sealing:
        return Sealing(self._pool, self._clock, self.kms, self._settings.kms)

    @staticmethod
    async def _again(name: str, seconds: float, act: Callable[[], Awaitable[object]]) -> None:
        while True:
            try:
                await act()
            except SidecarError as error:
                telemetry.log.warning("a timer waits", extra={"action": name, "error": error})
            except Exception as error:  # a defect of ours must not end the process that carries out shreds
                telemetry.log.error("a timer fails", extra={"action": name}, exc_info=error)
            await asyncio.sleep(seconds)


def create_topics(admin: Admin, settings: Settings) -> None:
    """Commands by tenant on four partitions; receipts and checkpoints are kept for ever; the ledger in one order."""
    control = settings.control
    wanted: dict[str, tuple[int, dict[str, str]]] = {
        control.topic: (4, {"cleanup.policy": "delete"}),
        control.receipts: (4, journal.FOR_EVER),
        control.ledger: (PARTITIONS, CONFIG),
        settings.audit.topic: (1, journal.FOR_EVER),
        settings.jobs.topic: (settings.jobs.partitions, jobs_topic.CONFIG),
    }
    present = admin.describe(wanted)
    for topic, (partitions, config) in wanted.items():
        if topic not in present:
            admin.create(topic, partitions, config)
