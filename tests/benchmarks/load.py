"""A deployment at full load: a data plane and a control plane as processes of their own, traffic that is always ahead, receipts as clients see them."""

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from sidecar.core.command import compose
from sidecar.core.model import Scope
from sidecar.postgres.connection import Connection, connected
from sidecar.settings import Settings
from tests.benchmarks.throughput import PARTITIONS, VALUE_BYTES, Bench, config_file

AHEAD = 20_000
"""Events that wait in the source topic at any time: the data plane never has to wait for one."""
OTHERS, OTHER_STREAMS, SMALL_STREAMS = 20, 100, 10
"""Tenants that nobody touches, which four of five events are of; their streams each; streams of a small tenant."""
PATIENCE_SECONDS = 120.0


@dataclass
class Process:
    """A plane. Its stderr is read to the end, so that it never waits for us."""

    process: asyncio.subprocess.Process
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    said: list[str] = field(default_factory=list)

    async def listen(self) -> None:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            if line.startswith(b"ready"):
                self.ready.set()
            self.said = [*self.said[-20:], line.decode(errors="replace")]

    async def wait_ready(self) -> None:
        await asyncio.wait_for(self.ready.wait(), PATIENCE_SECONDS)

    async def end(self, number: int = signal.SIGTERM) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(number)
        await self.process.wait()


@dataclass
class Load:
    """`small`: how many small tenants there are to be shredded, `small-0` and so on."""

    bench: Bench
    dsn: str
    topic: str
    settings: Settings
    config: Path
    small: int
    connection: Connection
    producer: Producer
    sender: Producer
    """Of commands alone."""
    sent: int = 0
    processes: list[Process] = field(default_factory=list)
    _receipts: Consumer | None = None

    async def start(self, *arguments: str) -> Process:
        """`python -m sidecar …`; ready when this returns."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "sidecar", "--config", str(self.config), *arguments, stderr=asyncio.subprocess.PIPE
        )
        started = Process(process)
        self.processes.append(started)
        asyncio.get_running_loop().create_task(started.listen()).add_done_callback(lambda _: None)
        await started.wait_ready()
        return started

    async def start_control(self) -> Process:
        control = await self.start("control")
        group = {"group.id": str(uuid4()), "isolation.level": "read_committed", "enable.auto.commit": False, "fetch.wait.max.ms": 10}
        self._receipts = Consumer({"bootstrap.servers": self.bench.bootstrap} | group)
        metadata = await asyncio.to_thread(self._receipts.list_topics, self.settings.control.receipts, 10)
        ends = []
        for partition in metadata.topics[self.settings.control.receipts].partitions:
            at = TopicPartition(self.settings.control.receipts, partition)
            ends.append(TopicPartition(at.topic, partition, (await asyncio.to_thread(self._receipts.get_watermark_offsets, at, 10))[1]))
        self._receipts.assign(ends)
        return control

    async def produce(self, stop: asyncio.Event) -> None:
        """Until stopped, as fast as the data plane stores it, and AHEAD of that."""
        padding = "x" * (VALUE_BYTES - 60)
        while not stop.is_set():
            stored = await self.stored()
            while self.sent < stored + AHEAD:
                for _ in range(500):
                    self._produce(padding)
                self.producer.poll(0)
                await asyncio.sleep(0)
            await asyncio.sleep(0.05)
        self.producer.flush(10)

    def _produce(self, padding: str) -> None:
        self.sent, n = self.sent + 1, self.sent
        if n % 5 == 0:
            tenant, stream = b"small-%d" % (n // 5 % self.small), b"s%d" % (n // 5 // self.small % SMALL_STREAMS)
        else:
            tenant, stream = b"other-%d" % (n % OTHERS), b"s%d" % (n // OTHERS % OTHER_STREAMS)
        headers = [("ce_id", b"%d" % n), ("ce_type", b"T"), ("ce_tenantid", tenant), ("ce_streamid", stream)]
        self.producer.produce(self.topic, json.dumps({"n": n, "padding": padding}).encode(), tenant + b"/" + stream, headers=headers)

    async def stored(self) -> int:
        return int(await self.connection.fetchval("SELECT coalesce(sum(next_offset), 0)::bigint FROM partition_leases"))

    async def until(self, query: str, holds: Callable[[Any], bool], *arguments: Any) -> Any:
        """The query's first answer that does."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            found = await self.connection.fetchval(query, *arguments)
            if holds(found):
                return found
            await asyncio.sleep(0.05)
        ended = [f"exit {each.process.returncode}: {''.join(each.said)}" for each in self.processes if each.process.returncode not in (None, -9)]
        raise RuntimeError("\n".join([f"waited {PATIENCE_SECONDS} s for: {query}; found {found}", *ended]))

    async def receipt(self, op: str, scope: Scope, final: str, **options: Any) -> tuple[float, dict[str, Any]]:
        """-> from the command's way out until its receipt is on the topic, in ms; the receipt."""
        now, command_id = datetime.now(UTC), uuid4()
        value = compose(
            command_id=command_id, audience=self.settings.deployment, op=op, scope=scope, reason="benchmark", requested_by="bench", ticket=None,
            issued_at=now, not_after=now + timedelta(hours=1), options=options,
        )  # fmt: skip
        started = time.perf_counter()
        self.sender.produce(self.settings.control.topic, value, scope.tenant.encode())
        body = await asyncio.to_thread(self._wait_for, str(command_id), {final, "rejected", "failed"})
        ms = (time.perf_counter() - started) * 1e3
        if body["status"] != final:
            raise RuntimeError(f"{op}: {body['status']} {body.get('error')}")
        return ms, body

    def _wait_for(self, command_id: str, statuses: set[str]) -> dict[str, Any]:
        assert self._receipts is not None
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            message = self._receipts.poll(1.0)
            if message is None or message.error() or message.value() is None:
                continue
            body: dict[str, Any] = json.loads(message.value() or b"")
            if body["command_id"] == command_id and body["status"] in statuses:
                return body
        raise RuntimeError(f"no receipt in {PATIENCE_SECONDS} s")


@asynccontextmanager
async def full_load(bench: Bench, small: int, prepare: Callable[[str], Any]) -> AsyncIterator[Load]:
    """A data plane that is kept busy, with a transactional view of everything. `prepare` fills the database before. No control plane yet."""
    dsn = await bench.database()
    await prepare(dsn)
    topic = f"bench-load-{uuid4().hex[:8]}"
    admin = AdminClient({"bootstrap.servers": bench.bootstrap})
    for future in admin.create_topics([NewTopic(topic, PARTITIONS, 1)]).values():
        future.result()
    views = [{"name": "load", "topic": f"view-{topic}", "partitions": PARTITIONS}]
    settings = bench.settings(topic, dsn, views=views)
    config = config_file(bench, settings, dsn, topic, views=views)
    stop = asyncio.Event()
    async with connected(dsn) as connection, connected(dsn) as for_traffic:
        producer, sender = (Producer({"bootstrap.servers": bench.bootstrap, "linger.ms": linger}) for linger in (5, 0))
        load = Load(bench, dsn, topic, settings, config, small, connection, producer, sender)
        traffic = asyncio.create_task(replace(load, connection=for_traffic).produce(stop))
        try:
            await load.start("run", "--instance-id", "bench")
            await load.until("SELECT count(*) FROM streams WHERE tenant_id LIKE 'small-%'", lambda n: n >= small * SMALL_STREAMS)
            yield load
        finally:
            stop.set()
            sender.flush(10)
            await asyncio.gather(traffic, *(process.end() for process in load.processes if process.process.returncode is None))
            await bench.drop(dsn)
