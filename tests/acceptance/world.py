"""One test's world: topics, database and deployment of its own on the shared stack; both planes as processes; what the store and the views hold."""

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import asyncpg
from confluent_kafka import Consumer, Producer, TopicPartition

from sidecar.app import compose
from sidecar.core.model import Erased, Event, Scope
from sidecar.event_store import EventStore
from sidecar.kafka.admin import Admin
from sidecar.kafka.client import client_config
from sidecar.kafka.ledger import LedgerTopic
from sidecar.keys import KeyManagement
from sidecar.kms import open_for
from sidecar.kms.file import create_key_file
from sidecar.ledger import LedgerGate
from sidecar.pipeline import Pipeline
from sidecar.postgres import migrations
from sidecar.postgres.connection import connect, open_pool
from sidecar.settings import Settings, load
from sidecar.testing import control_plane as kit
from sidecar.testing.control_plane import PATIENCE_SECONDS
from sidecar.testing.local_stack import LocalStack

T = TypeVar("T")
Headers = Sequence[tuple[str, bytes | None]]


def blocking(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """A coroutine's result, from synchronous code, whether or not a loop runs in this thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(main())).result()


def until(holds: Callable[[], T], what: str, seconds: float = PATIENCE_SECONDS) -> T:
    """The first truthy answer. Running out of patience is a failure, never a pass."""
    deadline = time.monotonic() + seconds
    while True:
        found = holds()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s for {what}; last: {found!r}")
        time.sleep(0.05)


def shown(row: Any, held: Any) -> dict[str, Any]:
    """A row and what it holds, as one dict."""
    status = "ok" if isinstance(held, Event) else "erased" if isinstance(held, Erased) else "error"
    names = ("tenant_id", "stream_id", "message_id", "is_tombstone")
    out = {name: row[name] for name in names} | {"position": row["stream_position"], "type": row["message_type"], "status": status}
    return out | {"value": held.value if isinstance(held, Event) else None, "error": type(held).__name__ if status == "error" else None}


@dataclass
class Plane:
    """A process of ours, until `stop` or `kill`."""

    process: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_ready(self, seconds: float = PATIENCE_SECONDS) -> "Plane":
        def ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"the process ended with {self.process.returncode}:\n{self.text()[-3000:]}")
            return any(line.startswith("ready") for line in self.text().splitlines())

        until(ready, f"the process to be ready:\n{self.text()[-2000:]}", seconds)
        return self

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_SECONDS)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()


@dataclass
class World:
    """`settings` as loaded from `config`; every name in it is this world's own."""

    stack: LocalStack
    folder: Path
    name: str
    config: Path
    settings: Settings
    planes: list[Plane] = field(default_factory=list)
    sent: dict[tuple[str, int], int] = field(default_factory=dict)
    """Behind the last record that was sent to each partition."""
    _producer: Producer | None = None
    _asking: Consumer | None = None

    # processes

    def start(self, *words: str, code: str = "") -> Plane:
        """`code`: Python to run in place of `-m sidecar`, with the same words."""
        log = self.folder / f"{words[0]}-{secrets.token_hex(4)}.log"
        with log.open("wb") as stderr:
            how = ["-c", code] if code else ["-m", "sidecar"]
            process = subprocess.Popen([sys.executable, *how, "--config", str(self.config), *words], stderr=stderr, stdout=stderr)
        self.planes.append(Plane(process, log))
        return self.planes[-1]

    def run(self, instance: str = "one", *, wait: bool = True) -> Plane:
        started = self.start("run", "--instance-id", f"{self.name}-{instance}")
        return started.wait_ready() if wait else started

    def control(self, *, wait: bool = True) -> Plane:
        started = self.start("control")
        return started.wait_ready() if wait else started

    def both(self, *instances: str) -> None:
        """The control plane, and the data plane's instances (`one`, where none is named), started side by side and ready."""
        control = self.control(wait=False)
        for instance in instances or ("one",):
            self.run(instance)
        control.wait_ready()

    def cli(self, *words: str, stdin: bytes = b"", environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "sidecar", "--config", str(self.config), *words]
        return subprocess.run(
            command, input=stdin, capture_output=True, timeout=PATIENCE_SECONDS, env=dict(os.environ) | (environment or {}), check=False
        )

    def json(self, *words: str, code: int = 0) -> Any:
        """What a command says on stdout, which must be JSON alone."""
        said = self.cli("-o", "json", *words)
        assert said.returncode == code, f"{words}: exit {said.returncode}\n{said.stdout.decode()}\n{said.stderr.decode()}"
        return json.loads(said.stdout)

    def close(self) -> None:
        for plane in self.planes:
            plane.kill()
        if self._asking is not None:
            self._asking.close()

    # Kafka

    def topic(self, name: str) -> str:
        return f"{self.name}.{name}"

    def create(self, topic: str, partitions: int = 2, **config: str) -> str:
        Admin(self.settings).create(topic, partitions, {k.replace("_", "."): v for k, v in config.items()})
        return topic

    @property
    def producer(self) -> Producer:
        if self._producer is None:
            own = {"acks": "all", "linger.ms": 2, "message.max.bytes": 12 * 2**20, "queue.buffering.max.kbytes": 262_144}
            self._producer = Producer(client_config(self.settings, **own))
        return self._producer

    def send(self, topic: str, value: bytes | None, headers: Headers, *, key: bytes | None = None, partition: int = -1, **more: Any) -> None:
        """Queue a record; `settle` waits for all."""
        self.producer.produce(topic, value, key, partition, headers=list(headers), on_delivery=self.delivered, **more)
        self.producer.poll(0)

    def delivered(self, error: Any, message: Any) -> None:
        assert error is None, error
        at = (message.topic(), message.partition())
        self.sent[at] = max(self.sent.get(at, 0), message.offset() + 1)

    def event(
        self, topic: str, value: bytes | None, *, tenant: str = "acme", stream: str = "s", type: str = "T", id: str | None = None, partition: int = -1,
        headers: Headers = (), **more: Any,
    ) -> str:  # fmt: skip
        """Queue a CloudEvent in binary mode; -> its id."""
        message_id = id or secrets.token_hex(8)
        own = [("ce_specversion", b"1.0"), ("ce_id", message_id.encode()), ("ce_type", type.encode()), ("ce_source", b"/test")]
        own += [("ce_tenantid", tenant.encode()), ("ce_streamid", stream.encode()), *headers]
        more.setdefault("key", f"{tenant}/{stream}".encode())
        self.send(topic, value, own, partition=partition, **more)
        return message_id

    def flush(self) -> None:
        assert self.producer.flush(PATIENCE_SECONDS) == 0

    def ends(self, topic: str) -> dict[int, int]:
        """Log end offsets."""
        admin = Admin(self.settings)
        return admin.offsets({topic: admin.describe([topic])[topic].partitions})[topic]

    def committed(self) -> dict[tuple[str, int], int]:
        """The group's committed offsets, of the partitions that were sent to: what is projected."""
        if self._asking is None:
            self._asking = Consumer(client_config(self.settings, **{"group.id": self.settings.group_id}))
        found = self._asking.committed([TopicPartition(*at) for at in self.sent], timeout=PATIENCE_SECONDS)
        return {(tp.topic, tp.partition): tp.offset for tp in found}

    def settle(self) -> None:
        """Everything that was sent is stored and projected, or answered otherwise: the group's offsets are behind it."""
        self.flush()

        def done() -> bool:
            for plane in self.planes:
                assert plane.process.poll() is None or plane.process.returncode in (0, -9), f"a plane died:\n{plane.text()[-3000:]}"
            at = self.committed()
            return all(at.get(p, 0) >= end for p, end in self.sent.items())

        try:
            until(done, f"{self.sent} to be stored and projected")
        except AssertionError as error:
            raise AssertionError(f"{error}; at {self.committed()}\n" + "\n".join(plane.text()[-1500:] for plane in self.planes)) from None

    def records(self, topic: str) -> list[Any]:
        """Every committed record from the beginning to the end as it is now, of a partition in order."""
        return kit.read_topic(self.settings, topic)

    def dead_letters(self) -> dict[tuple[str, int, int], str]:
        """As the topic has them: source → reason."""
        out = {}
        for message in self.records(self.settings.dead_letters.topic):
            of = {name: (value or b"").decode() for name, value in message.headers()}
            assert message.value() == b""
            out[of["source_topic"], int(of["source_partition"]), int(of["source_offset"])] = of["reason"]
        return out

    # Postgres

    @property
    def dsn(self) -> str:
        return self.settings.postgres.for_role("migrator")

    def sql(self, query: str, *arguments: Any) -> list[Any]:
        async def fetch() -> list[Any]:
            connection = await connect(self.dsn)
            try:
                return list(await connection.fetch(query, *arguments))
            finally:
                await connection.close()

        return blocking(fetch)

    def value(self, query: str, *arguments: Any) -> Any:
        return self.sql(query, *arguments)[0][0]

    async def migrate(self) -> None:
        connection = await connect(self.dsn)
        try:
            await migrations.migrate(connection)
        finally:
            await connection.close()

    # what a reader sees

    def events(self, tenant: str, *, stream: str | None = None, stream_class: str | None = None, subject: str | None = None) -> list[dict[str, Any]]:
        """What `sidecar events list` says (its rows, with the value's bytes as `value`), without the cost of a process."""

        async def read() -> list[dict[str, Any]]:
            pool = await open_pool(self.settings.postgres.for_role("reader"), application_name="a test")
            try:
                store = EventStore(
                    pool, KeyManagement(open_for(self.settings.kms, "reader")), LedgerGate(LedgerTopic(self.settings), self.settings.deployment)
                )
                found = await store.read(tenant, stream=stream, stream_class=stream_class, subject=subject, limit=1_000_000)
            finally:
                await pool.close()
            return [shown(row, held) for row, held in found]

        return blocking(read)

    def carry_out(
        self, op: str, scope: Scope, *, final: tuple[str, ...] = ("done", "inaccessible", "rejected", "failed"), **changes: Any
    ) -> dict[str, Any]:
        """Send a command as it stands; its final receipt. A control plane must run."""
        command_id, raw = kit.command(self.settings, op, scope, **changes)
        kit.send(self.settings, raw, key=scope.tenant)
        return self.receipt(str(command_id), final)

    def receipt(self, command_id: str, final: tuple[str, ...] = ("done", "inaccessible", "rejected", "failed")) -> dict[str, Any]:
        def come() -> dict[str, Any] | None:
            found = self.sql(
                "SELECT body FROM receipts WHERE command_id = $1::text::uuid AND status = ANY ($2) ORDER BY created_at LIMIT 1",
                command_id,
                list(final),
            )
            return None if not found else found[0]["body"] if isinstance(found[0]["body"], dict) else json.loads(found[0]["body"])

        return until(come, f"the final receipt of {command_id}")  # type: ignore[return-value]


@contextmanager
def in_process(world: World, pipeline: Callable[..., Pipeline], instance: str = "one", *, dies: bool = False) -> Iterator[None]:
    """A data plane in a thread of this process, with a pipeline that a test has a hand in; `dies`: it is to end by an exception, and is waited for."""
    failures: list[BaseException] = []
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def main() -> None:
        try:
            plane = await compose(world.settings, f"{world.name}-{instance}", pipeline_of=pipeline)
            running.append((asyncio.get_running_loop(), asyncio.Event()))
            await plane.run(running[0][1])
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        until(lambda: running or failures, "the data plane to start")
        assert not failures, failures
        yield
        if dies:
            until(lambda: failures, "the data plane to end by itself")
    except BaseException as error:
        error.add_note(f"the data plane: {failures or 'no exception'}")
        raise
    finally:
        for loop, stop in running:
            with suppress(RuntimeError):  # it died: its loop is closed
                loop.call_soon_threadsafe(stop.set)
        thread.join(PATIENCE_SECONDS)
    assert bool(failures) is dies, failures


@contextmanager
def again_and_again(act: Callable[[int], None], pause: float) -> Iterator[None]:
    """`act(0)`, `act(1)`, … in a thread of its own, with that pause between them, until the block ends."""
    stop = threading.Event()

    def run() -> None:
        for number in count():
            act(number)
            if stop.wait(pause):
                return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def build(
    stack: LocalStack,
    dsn: str,
    folder: Path,
    name: str,
    *,
    extra_sources: Sequence[dict[str, Any]] = (),
    kafka_client: dict[str, Any] | None = None,
    partitions: int = 2,
    **changes: Any,
) -> World:
    """A configuration with a source topic `in`, a few classes and a view of everything; `changes` replace its sections."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "kek").exists():
        create_key_file(folder / "kek")
    document: dict[str, Any] = {
        "deployment": name,
        "kafka": {"bootstrap_servers": stack.bootstrap_servers, "client": kafka_client or {}},
        "postgres": {"dsn": dsn},
        "kms": {"uri": "file:./kek"},
        "sources": [{"topic": f"{name}.in"}, *extra_sources],
        "classes": [
            {"class": "Aes", "when": {"stream": "aes-*"}},
            {"class": "ChaCha", "when": {"stream": "chacha-*"}},
            {"class": "Siv", "when": {"stream": "siv-*"}},
            {"class": "PerClass", "when": {"stream": "class-*"}},
            {"class": "PerTenant", "when": {"stream": "tenant-*"}},
            {"class": "CartData", "when": {"stream": "cart-*"}},
        ],
        "policies": {
            "install": [
                {"class": "ChaCha", "algorithm": "ChaCha20-Poly1305"},
                {"class": "PerClass", "key_scope": "class"},
                {"class": "PerTenant", "key_scope": "tenant", "algorithm": "ChaCha20-Poly1305"},
            ]
        },
        "views": [{"name": "all", "topic": f"{name}.view", "partitions": 3}],
        "control": {"topic": f"{name}.control", "receipts": f"{name}.receipts", "ledger": f"{name}.ledger", "allow_unsigned": True},
        "audit": {"topic": f"{name}.audit", "checkpoint_every": "500ms"},
        "dead_letters": {"topic": f"{name}.dead"},
        "jobs": {"topic": f"{name}.jobs"},
        "http": {"port": 0},
    }
    config = kit.write_config(folder, document | changes)
    world = World(stack, folder, name, config, load(config))
    blocking(world.migrate)
    for source in world.settings.sources:
        if not set(source.topic) & set("*?["):
            world.create(source.topic, partitions, max_message_bytes=str(12 * 2**20))
    return world


@contextmanager
def world_on(stack: LocalStack, folder: Path, **changes: Any) -> Iterator[World]:
    """A world with a database of its own, for fixtures that outlive a test; gone at the end."""
    database = f"test_{secrets.token_hex(6)}"
    dsn = urlsplit(stack.dsn)._replace(path=f"/{database}").geturl()

    def execute(sql: str) -> None:
        async def main() -> None:
            connection = await asyncpg.connect(stack.dsn)
            try:
                await connection.execute(sql)
            finally:
                await connection.close()

        blocking(main)

    execute(f"CREATE DATABASE {database} TEMPLATE template0")
    world = build(stack, dsn, folder, f"w{secrets.token_hex(5)}", **changes)
    try:
        yield world
    finally:
        world.close()
        execute(f"DROP DATABASE {database} WITH (FORCE)")
