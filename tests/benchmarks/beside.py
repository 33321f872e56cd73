"""What the control plane and its timers cost the data plane when there is nothing to do: the same throughput with one beside it, and without."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sidecar.app import compose
from sidecar.settings import Settings
from tests.benchmarks.load import Process
from tests.benchmarks.throughput import Bench, config_file, drain, numbers

SETTLED_SECONDS = 3.0
"""So long after its start a control plane is left alone, before the clock starts."""


@asynccontextmanager
async def control(bench: Bench, settings: Settings, dsn: str, topic: str, **more: Any) -> AsyncIterator[None]:
    """Ready, and over its start."""
    config = config_file(bench, settings, dsn, topic, **more)
    arguments = ("-m", "sidecar", "--config", str(config), "control")
    process = Process(await asyncio.create_subprocess_exec(sys.executable, *arguments, stderr=asyncio.subprocess.PIPE))
    listening = asyncio.create_task(process.listen())
    try:
        await process.wait_ready()
        await asyncio.sleep(SETTLED_SECONDS)
        yield
    finally:
        await process.end()
        await listening


async def one(bench: Bench, topic: str, count: int, *, beside: bool) -> tuple[float, float]:
    """-> events per second; CPU of this process per event, in µs."""
    dsn = await bench.database()
    number = next(numbers)
    views = [{"name": f"view{number}", "topic": f"view-{number}", "partitions": 4}]
    settings = bench.settings(topic, dsn, views=views)
    plane = await compose(settings, f"bench-{number}")
    try:
        if not beside:
            cpu = time.process_time()
            return await drain(plane, count), (time.process_time() - cpu) / count * 1e6
        async with control(bench, settings, dsn, topic, views=views):
            cpu = time.process_time()
            return await drain(plane, count), (time.process_time() - cpu) / count * 1e6
    finally:
        await bench.drop(dsn)


async def ratio(bench: Bench, count: int, rounds: int) -> dict[str, Any]:
    topic = bench.topic(count)
    alone: list[tuple[float, float]] = []
    with_one: list[tuple[float, float]] = []
    for number in range(rounds + 1):  # the first round warms caches and is not counted
        for into, beside in ((alone, False), (with_one, True)):
            measured = await one(bench, topic, count, beside=beside)
            print(f"  round {number} {'beside' if beside else 'alone ':8s} {measured[0]:8.0f} events/s {measured[1]:6.2f} µs", file=sys.stderr)
            if number:
                into.append(measured)
    pairs = list(zip(with_one, alone, strict=True))
    return {
        "beside a control plane / alone": [a[0] / b[0] for a, b in pairs],
        "CPU per event, beside a control plane / alone": [a[1] / b[1] for a, b in pairs],
    }
