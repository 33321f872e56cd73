"""From a command on the control topic to its receipt, while a data plane is kept busy."""

import asyncio
import json
import statistics
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from confluent_kafka import Producer

from sidecar.app import compose
from sidecar.core.command import compose as compose_command
from sidecar.core.model import Scope, ScopeKind
from sidecar.postgres.connection import connected
from sidecar.settings import Settings
from tests.benchmarks.throughput import VALUE_BYTES, Bench, config_file, drain

LOAD_PER_SECOND = 2000


class Traffic:
    """A steady stream of events of many small tenants, until stopped."""

    def __init__(self, bootstrap: str, topic: str, tenants: int) -> None:
        self._producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 5})
        self._topic, self._tenants, self.sent = topic, tenants, 0

    async def run(self, stop: asyncio.Event) -> None:
        padding = "x" * (VALUE_BYTES - 60)
        while not stop.is_set():
            for _ in range(LOAD_PER_SECOND // 20):
                self.sent += 1
                tenant = f"small-{self.sent % self._tenants}".encode()
                headers = [("ce_id", b"%d" % self.sent), ("ce_type", b"T"), ("ce_tenantid", tenant), ("ce_streamid", b"s%d" % (self.sent % 7))]
                self._producer.produce(self._topic, json.dumps({"n": self.sent, "padding": padding}).encode(), tenant, headers=headers)
            self._producer.poll(0)
            await asyncio.sleep(0.05)
        self._producer.flush(10)


async def receipt_ms(settings: Settings, connection: Any, producer: Producer, op: str, scope: Scope, final: str) -> tuple[float, float]:
    """-> (command to receipt as a client sees it in the outbox, accepted to receipt by the product's own clock), in ms."""
    now, command_id = datetime.now(UTC), uuid4()
    value = compose_command(
        command_id=command_id, audience=settings.deployment, op=op, scope=scope, reason="benchmark", requested_by="bench", ticket=None,
        issued_at=now, not_after=now + timedelta(hours=1), options={},
    )  # fmt: skip
    started = time.perf_counter()
    producer.produce(settings.control.topic, value, scope.tenant.encode())
    producer.flush(10)
    while True:
        row = await connection.fetchrow(
            "SELECT status, created_at FROM receipts WHERE command_id = $1 AND status = ANY ($2)", command_id, [final, "rejected", "failed"]
        )
        if row is not None:
            break
        await asyncio.sleep(0.002)
    if row["status"] != final:
        raise RuntimeError(f"{op}: {row['status']}")
    return (time.perf_counter() - started) * 1e3, (row["created_at"] - now).total_seconds() * 1e3


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


async def latencies(bench: Bench, shreds: int, large: int) -> dict[str, Any]:
    dsn = await bench.database()
    topic = bench.topic(large, streams=large, tenants=1, prefix="large")
    views = [{"name": "commands", "topic": "view-commands", "partitions": 4, "match": {"tenants": ["small-*"]}}]
    settings = bench.settings(topic, dsn, views=views)
    await drain(await compose(settings, "bench-commands"), large)
    plane, stop = await compose(settings, "bench-commands"), asyncio.Event()
    running = asyncio.create_task(plane.run(stop))
    config = config_file(bench, settings, dsn, topic, views=views)
    control = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar", "--config", str(config), "control", stderr=asyncio.subprocess.PIPE
    )
    traffic = Traffic(bench.bootstrap, topic, shreds)
    load = asyncio.create_task(traffic.run(stop))
    try:
        await _until_ready(control)
        async with connected(dsn) as connection:
            while await connection.fetchval("SELECT count(*) FROM tenants") < shreds + 1:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            return await _measure(settings, connection, bench, shreds)
    finally:
        stop.set()
        control.terminate()
        await asyncio.gather(control.wait(), load, running)
        await bench.drop(dsn)


async def _until_ready(process: asyncio.subprocess.Process) -> None:
    assert process.stderr is not None
    while line := await process.stderr.readline():
        if line.startswith(b"ready"):
            asyncio.get_running_loop().create_task(process.stderr.read()).add_done_callback(lambda _: None)
            return
    raise RuntimeError("the control plane did not become ready")


async def _measure(settings: Settings, connection: Any, bench: Bench, shreds: int) -> dict[str, Any]:
    producer = Producer({"bootstrap.servers": bench.bootstrap, "linger.ms": 0})
    rotated = []
    for n in range(shreds):
        streams = [r["stream_id"] for r in await connection.fetch("SELECT stream_id FROM streams WHERE tenant_id = $1 LIMIT 1", f"small-{n}")]
        scope = Scope(tenant=f"small-{n}", kind=ScopeKind.STREAM, id=streams[0])
        rotated.append((await receipt_ms(settings, connection, producer, "rotate", scope, "done"))[0])
    shredded = [(await receipt_ms(settings, connection, producer, "shred", Scope.of_tenant(f"small-{n}"), "inaccessible"))[0] for n in range(shreds)]
    one_large = (await receipt_ms(settings, connection, producer, "shred", Scope.of_tenant("t0"), "inaccessible"))[0]
    return {
        "rotate p50 ms": statistics.median(rotated),
        "rotate p99 ms": percentile(rotated, 0.99),
        "shred p50 ms": statistics.median(shredded),
        "shred p99 ms": percentile(shredded, 0.99),
        "shred of 100,000 streams ms": one_large,
    }
