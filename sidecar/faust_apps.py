"""The control plane's Faust app: the only file that imports faust.

Faust carries records from the control topic to the inbox, and nothing else: no tables, no leader topic, no web server, no logging of its own.
Its agents commit past a record whose handler raised, so nothing is ever raised into Faust: `Inbox.receive` comes back when the record is
durable, and the record is acked after that. Delivery is at least once; the inbox knows what it has.
"""

import asyncio
import logging
import signal
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final

import faust
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread
from faust.transport.drivers.aiokafka import Consumer as FaustConsumer

from sidecar import telemetry
from sidecar.control import ControlPlane
from sidecar.core.errors import Unavailable
from sidecar.inbox import Backoff, ControlRecord
from sidecar.memory import no_core_dumps
from sidecar.settings import KafkaSecurity, Settings

THREADS: Final = 16
"""For blocking calls to the broker. The default of cores + 4 lets a few unreachable instances stall everything else."""
START_SECONDS: Final = 30.0


class _CommittedThread(AIOKafkaConsumerThread):  # type: ignore[misc]
    """Faust reads uncommitted unless it writes transactions itself. A command whose sender aborted must not be carried out."""

    def _create_worker_consumer(self, transport: Any) -> Any:
        consumer = super()._create_worker_consumer(transport)
        consumer._isolation_level = "read_committed"
        return consumer


class _CommittedConsumer(FaustConsumer):  # type: ignore[misc]
    def _new_consumer_thread(self) -> _CommittedThread:
        return _CommittedThread(self, loop=self.loop, beacon=self.beacon)


def _security(security: KafkaSecurity) -> dict[str, Any]:
    """`broker_credentials` from kafka.security."""
    if security.protocol == "PLAINTEXT":
        return {}
    context = None
    if security.protocol.endswith("SSL"):
        context = ssl.create_default_context(cafile=security.ca_file)
        if security.certificate_file is not None:
            context.load_cert_chain(security.certificate_file, security.key_file)
    if not security.protocol.startswith("SASL"):
        return {"broker_credentials": faust.SSLCredentials(context=context)}
    mechanism = faust.types.auth.SASLMechanism(security.mechanism)
    credentials = faust.SASLCredentials(username=security.username, password=security.secret(), mechanism=mechanism, ssl_context=context)
    return {"broker_credentials": credentials}


def build(settings: Settings, plane: ControlPlane, folder: str) -> Any:
    """The app; `folder` is where Faust may write, which it hardly does."""
    servers = [f"kafka://{server.strip()}" for server in settings.kafka.bootstrap_servers.split(",")]
    group = f"{settings.deployment}.control"
    app: Any = faust.App(
        group,
        broker=servers,
        datadir=folder,
        origin=None,
        autodiscover=False,
        table_standby_replicas=0,
        topic_disable_leader=True,
        topic_allow_declare=False,
        web_enabled=False,
        stream_wait_empty=False,
        key_serializer="raw",
        value_serializer="raw",
        consumer_auto_offset_reset="earliest",
        # Only the leader receives, always under this name: a successor takes its predecessor's partitions at once, and fences it.
        consumer_group_instance_id=group,
        broker_commit_interval=1.0,
        broker_session_timeout=10.0,
        broker_heartbeat_interval=3.0,
        broker_request_timeout=30.0,
        **_security(settings.kafka.security),
    )
    app.transport.Consumer = _CommittedConsumer
    topic = app.topic(settings.control.topic, key_serializer="raw", value_serializer="raw", allow_empty=True, acks=True)

    async def receive(stream: AsyncIterator[Any]) -> None:
        async for events in stream.noack_take(100, within=0.002):  # type: ignore[attr-defined]
            messages = [event.message for event in events]
            await plane.inbox.receive(*(ControlRecord(value=m.value, source=f"{m.topic}/{m.partition}/{m.offset}") for m in messages))
            for event in events:
                event.ack()

    app.agent(topic, name="control")(receive)
    return app


class Receiver:
    """Runs the app while this process leads; makes a new one when it crashed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._task: asyncio.Task[None] | None = None
        self._up = asyncio.Event()

    async def start(self, plane: ControlPlane) -> None:
        """Returns at once; `ready` says when records come in."""
        self._task = asyncio.create_task(self._run(plane))

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    @property
    def ready(self) -> bool:
        return self._task is None or self._up.is_set()

    async def _run(self, plane: ControlPlane) -> None:
        backoff = Backoff()
        while True:
            with tempfile.TemporaryDirectory(prefix="sidecar-control-") as folder:
                app = build(self._settings, plane, folder)
                try:
                    await asyncio.wait_for(app.start(), START_SECONDS)
                    self._up.set()
                    backoff = Backoff()
                    while not (app.crashed or app.should_stop):  # noqa: ASYNC110 (Faust tells nobody)
                        await asyncio.sleep(0.2)
                    telemetry.log.error("the receiver stopped", extra={"action": "receive", "error": app.crash_reason})
                except Exception as error:
                    telemetry.log.warning("the receiver does not start", extra={"action": "receive", "error": error})
                finally:
                    self._up.clear()
                    await _stop(app)
            await backoff.wait()


async def _stop(app: Any) -> None:
    """Commits what was acked. A broker that is away must not keep the process: what was not committed comes again."""
    with suppress(Exception):
        await asyncio.wait_for(app.stop(), 5)


async def run_control_plane(settings: Settings, *, http: bool = True, timer_seconds: float = 60.0) -> None:
    """`sidecar control`: until SIGTERM or SIGINT. Raises ConfigurationError; what cannot be reached yet is waited for."""
    telemetry.start_logging()
    no_core_dumps()
    for noisy in ("faust", "mode", "aiokafka", "kafka", __name__):  # the last one: Faust logs in the name of who subclasses it
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if settings.control.allow_unsigned:
        warning = "control.allow_unsigned is true: whoever may write to the control topic can shred. For development only."
        telemetry.log.warning(warning, extra={"action": "start", "topic": settings.control.topic})
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(THREADS, "sidecar"))
    stopping = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stopping.set)
    receiver = Receiver(settings)
    plane = ControlPlane(settings, lead=receiver.start, follow=receiver.stop, timer_seconds=timer_seconds)

    def ready() -> tuple[bool, str]:
        serves, why = plane.ready()
        return (False, "starting: no control records are received yet") if serves and not receiver.ready else (serves, why)

    runner = await telemetry.start_http(settings.http, ready=ready) if http else None
    work = asyncio.create_task(_open_and_run(plane))
    stop = asyncio.create_task(stopping.wait())
    announce = asyncio.create_task(_announce(ready, runner))
    try:
        await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
    finally:
        for task in (announce, stop, work):
            task.cancel()
        await asyncio.gather(announce, stop, work, return_exceptions=True)
        if runner is not None:
            await runner.cleanup()
        await plane.close()
        telemetry.log.info("stopped", extra={"action": "stop"})
        sys.stderr.flush()


async def _open_and_run(plane: ControlPlane) -> None:
    """Postgres and Kafka may come up after us."""
    backoff = Backoff()
    while True:
        try:
            await plane.open()
            break
        except Unavailable as error:
            telemetry.log.warning("control waits", extra={"action": "start", "error": error})
            await backoff.wait()
    await plane.run()


async def _announce(ready: Any, runner: Any) -> None:
    while not ready()[0]:  # noqa: ASYNC110 (several parties have a say in it)
        await asyncio.sleep(0.02)
    telemetry.say_ready(runner)
