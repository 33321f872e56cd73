"""The command path, free of Faust: receive into the inbox, carry out, publish receipts.

    Inbox      (inbox.py) a control record becomes a row of the inbox and a receipt in the outbox; after that it may be acked
    Executor   (executor.py) the one process that holds the deployment's lock works off the inbox: per tenant one after another, tenants side by side
    Outbox     (outbox.py) publishes receipts in order; after a crash it looks on the topic for what was published, so none is there twice
    timers     put rotations that are due by age into the inbox, as commands of their own, and whatever else `_timers` lists

What cannot be reached is waited for, with growing pauses and for ever: nothing is lost, and no tenant waits for another's trouble.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Final

from sidecar import grace, telemetry
from sidecar.checkpoints import Checkpoints
from sidecar.clean_up import CleanUp
from sidecar.core.errors import KmsUnavailable, LedgerBehind, SidecarError, Unavailable
from sidecar.core.model import duration_ms
from sidecar.event_store import EventStore
from sidecar.evidence import Evidence
from sidecar.executor import AT_ONCE, Executor
from sidecar.holds import Holding
from sidecar.inbox import ControlRecord, Inbox, schedule_rotations
from sidecar.jobs import Jobs
from sidecar.kafka import jobs as jobs_topic
from sidecar.kafka import journal
from sidecar.kafka.admin import Admin
from sidecar.kafka.client import ProducerFenced
from sidecar.kafka.ledger import CONFIG, PARTITIONS, LedgerTopic
from sidecar.kafka.receipts import ReceiptPublisher, ViewWriter
from sidecar.keys import KeyManagement
from sidecar.kms import check_identity, open_for
from sidecar.ledger import Ledger, LedgerGate
from sidecar.ledger_replay import answer_asked
from sidecar.notices import Notices
from sidecar.outbox import Outbox
from sidecar.ports import Clock
from sidecar.postgres import commands, guard, migrations
from sidecar.postgres.connection import Connection, connect, open_pool, refuse_transaction_pooling
from sidecar.postgres.durability import check_standby
from sidecar.postgres.guard import Backend
from sidecar.readmission import Readmission
from sidecar.rereading import Rereading
from sidecar.residue import Residue
from sidecar.rotation import Rotation
from sidecar.sealing import Sealing
from sidecar.settings import Settings
from sidecar.shredding import Shredding
from sidecar.signing import control_signer
from sidecar.steps import Flow, Steps, SystemClock
from sidecar.waiting import POLL_SECONDS, Backoff

CLEAN_UP_SECONDS: Final = 86_400.0
CERTIFY_SECONDS: Final = 2.0


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
