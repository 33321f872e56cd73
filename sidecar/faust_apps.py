"""The Faust apps of control plane and workers: the only file that imports faust.

Faust carries records from the control topic to the inbox and chunks from the jobs topic to a worker, and nothing else: no tables, no leader topic, no web server, no logging of its own.
Its agents commit past a record whose handler raised, so nothing is ever raised into Faust: `Inbox.receive` comes back when the record is
durable, and the record is acked after that. Delivery is at least once; the inbox knows what it has.
"""

import asyncio
import logging
import signal
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final

import faust
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread
from faust.transport.drivers.aiokafka import Consumer as FaustConsumer

from sidecar import probes, telemetry
from sidecar.control import ControlPlane
from sidecar.core.errors import Unavailable
from sidecar.inbox import ControlRecord
from sidecar.memory import no_core_dumps
from sidecar.rereading import group_of
from sidecar.servers import KafkaSecurity
from sidecar.settings import Settings
from sidecar.waiting import Backoff
from sidecar.worker import Worker

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


Receive = Callable[[list[Any]], Awaitable[None]]
"""Takes a few messages, and returns when they may be acked."""


def build(settings: Settings, plane: ControlPlane, folder: str) -> Any:
    """The control plane's app; `folder` is where Faust may write, which it hardly does."""

    async def receive(messages: list[Any]) -> None:
        await plane.receive([ControlRecord(value=m.value, source=f"{m.topic}/{m.partition}/{m.offset}") for m in messages])

    group = group_of(settings)
    # Only the leader receives, always under this name: a successor takes its predecessor's partitions at once, and fences it.
    return _app(settings, folder, group, settings.control.topic, receive, at_once=100, consumer_group_instance_id=group)


def build_worker(settings: Settings, worker: Worker, folder: str) -> Any:
    """A worker's app: one chunk at a time. Those of a worker that dies are redelivered to another."""

    async def receive(messages: list[Any]) -> None:
        for message in messages:
            await worker.receive(message.value)

    return _app(settings, folder, f"{settings.deployment}.workers", settings.jobs.topic, receive, at_once=1)


def _app(settings: Settings, folder: str, group: str, topic_name: str, receive: Receive, *, at_once: int, **more: Any) -> Any:
    servers = [f"kafka://{server.strip()}" for server in settings.kafka.bootstrap_servers.split(",")]
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
        broker_commit_interval=1.0,
        broker_session_timeout=10.0,
        broker_heartbeat_interval=3.0,
        broker_request_timeout=30.0,
        **_security(settings.kafka.security),
        **more,
    )
    app.transport.Consumer = _CommittedConsumer
    topic = app.topic(topic_name, key_serializer="raw", value_serializer="raw", allow_empty=True, acks=True)

    async def take(stream: AsyncIterator[Any]) -> None:
        async for events in stream.noack_take(at_once, within=0.002):  # type: ignore[attr-defined]
            await receive([event.message for event in events])
            for event in events:
                event.ack()

    app.agent(topic, name=topic_name)(take)
    return app


class Receiver:
    """Runs an app of `build` (with what it works for) between `start` and `stop`; makes a new one when it crashed."""

    def __init__(self, settings: Settings, build: Callable[[Settings, Any, str], Any] = build) -> None:
        self._settings, self._build = settings, build
        self._task: asyncio.Task[None] | None = None
        self._up = asyncio.Event()

    async def start(self, plane: Any) -> None:
        """Returns at once; `ready` says when records come in."""
        self._task = asyncio.create_task(self._run(plane))

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    @property
    def is_up(self) -> bool:
        return self._up.is_set()

    @property
    def ready(self) -> bool:
        return self._task is None or self._up.is_set()

    async def _run(self, plane: Any) -> None:
        backoff = Backoff()
        while True:
            with tempfile.TemporaryDirectory(prefix="sidecar-control-") as folder:
                app = self._build(self._settings, plane, folder)
                try:
                    async with asyncio.timeout(START_SECONDS):
                        await app.start()
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
        async with asyncio.timeout(5):
            await app.stop()


async def run_control_plane(settings: Settings, *, http: bool = True, timer_seconds: float = 60.0) -> None:
    """`sidecar control`: until SIGTERM or SIGINT. Raises ConfigurationError; what cannot be reached yet is waited for."""
    stopping = _prepare()
    if settings.control.allow_unsigned:
        warning = "control.allow_unsigned is true: whoever may write to the control topic can shred. For development only."
        telemetry.log.warning(warning, extra={"action": "start", "topic": settings.control.topic})
    receiver = Receiver(settings)
    plane = ControlPlane(settings, lead=receiver.start, follow=receiver.stop, timer_seconds=timer_seconds)

    def ready() -> tuple[bool, str]:
        serves, why = plane.ready()
        return (False, "starting: no control records are received yet") if serves and not receiver.ready else (serves, why)

    await _serve(settings, _open_and_run(plane), ready, stopping, plane.close, http=http)


async def run_worker(settings: Settings, instance_id: str) -> None:
    """`sidecar worker`: until SIGTERM or SIGINT; a chunk that is not done by then is another worker's. Raises ConfigurationError."""
    stopping = _prepare()
    worker, receiver = Worker(settings, instance_id), Receiver(settings, build_worker)

    async def work() -> None:
        await _opened(worker.open, "worker")
        await receiver.start(worker)
        await asyncio.Event().wait()

    def ready() -> tuple[bool, str]:
        return (True, "active") if receiver.is_up else (False, "starting: no chunks are received yet")

    async def close() -> None:
        await receiver.stop()
        await worker.close()

    await _serve(settings, work(), ready, stopping, close)


def _prepare() -> asyncio.Event:
    """Logging, threads, signals; -> set when it is time to stop."""
    telemetry.start_logging()
    no_core_dumps()
    for noisy in ("faust", "mode", "aiokafka", "kafka", __name__):  # the last one: Faust logs in the name of who subclasses it
        logging.getLogger(noisy).setLevel(logging.ERROR)
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(THREADS, "sidecar"))
    stopping = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stopping.set)
    return stopping


async def _serve(
    settings: Settings, main: Coroutine[Any, Any, None], ready: Callable[[], tuple[bool, str]], stopping: asyncio.Event,
    close: Callable[[], Awaitable[None]], *, http: bool = True,
) -> None:  # fmt: skip
    """`main` beside the probes, until it ends or it is time to stop."""
    runner = await probes.serve(settings.http, ready=ready) if http else None
    work = asyncio.create_task(main)
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
        await close()
        telemetry.log.info("stopped", extra={"action": "stop"})
        sys.stderr.flush()


async def _open_and_run(plane: ControlPlane) -> None:
    await _opened(plane.open, "control")
    await plane.run()


async def _opened(open_it: Callable[[], Awaitable[None]], who: str) -> None:
    """Postgres and Kafka may come up after us."""
    backoff = Backoff()
    while True:
        try:
            return await open_it()
        except Unavailable as error:
            telemetry.log.warning(f"{who} waits", extra={"action": "start", "error": error})
            await backoff.wait()


async def _announce(ready: Any, runner: Any) -> None:
    while not ready()[0]:  # noqa: ASYNC110 (several parties have a say in it)
        await asyncio.sleep(0.02)
    probes.say_ready(runner)
