"""Events per second that workers seal anew: each a process of its own that gets its chunks from the jobs topic, as in earnest."""

import asyncio
import secrets
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import orjson

from sidecar.core.model import Scope
from sidecar.core.store import NewEvent
from sidecar.kafka.jobs import publish
from sidecar.library import Library, open_library
from sidecar.postgres import jobs
from sidecar.postgres.connection import transaction
from sidecar.settings import Settings
from tests.benchmarks.load import Process
from tests.benchmarks.throughput import VALUE_BYTES, Bench, config_file

TENANT = "acme"
EVENTS_PER_STREAM = 250
AT_ONCE = 8
SETTLED_SECONDS = 6.0
"""After the last worker's start: its group has shared out the partitions by then."""
PATIENCE_SECONDS = 300.0


async def seed(library: Library, events: int) -> None:
    slots = asyncio.Semaphore(AT_ONCE)
    value = {"email": "jane@example.org", "padding": secrets.token_hex(VALUE_BYTES // 2)}

    async def one(stream: int) -> None:
        async with slots:
            await library.store.append_to_stream(f"s{stream}", [NewEvent(type="T", data=value)] * EVENTS_PER_STREAM, tenant=TENANT)

    await asyncio.gather(*(one(n) for n in range(events // EVENTS_PER_STREAM)))
    await library.plain.pool.execute("VACUUM ANALYZE")


@asynccontextmanager
async def workers(config: Path, count: int) -> AsyncIterator[None]:
    """Ready, and with their shares of the jobs topic."""
    arguments = ("-m", "sidecar", "--config", str(config), "worker", "--instance-id")
    started = [
        Process(await asyncio.create_subprocess_exec(sys.executable, *arguments, f"w{n}", stderr=asyncio.subprocess.PIPE)) for n in range(count)
    ]
    listening = [asyncio.create_task(process.listen()) for process in started]
    try:
        for process in started:
            await process.wait_ready()
        await asyncio.sleep(SETTLED_SECONDS)
        yield
    finally:
        for process in started:
            await process.end()
        await asyncio.gather(*listening)


async def one(library: Library, settings: Settings) -> tuple[float, int]:
    """Rotate, and seal all of it anew. -> events per second, from the first chunk on the topic to the last that is done; workers that took part."""
    pool, command_id = library.plain.pool, uuid4()
    await library.keys.rotate_key(Scope.of_tenant(TENANT))
    async with transaction(pool) as connection:
        chunks = await jobs.plan(connection, command_id, Scope.of_tenant(TENANT), plain=False)
    started = time.perf_counter()
    await asyncio.to_thread(publish, settings, [orjson.dumps({"command_id": str(command_id), "chunk": n}) for n in range(chunks)])
    while time.perf_counter() < started + PATIENCE_SECONDS:
        async with transaction(pool) as connection:
            [found] = await jobs.progress(connection, command_id)
        if found["state"] == "done":
            return found["resealed"] / (time.perf_counter() - started), found["workers"]
        await asyncio.sleep(0.02)
    raise AssertionError("the workers are not done")


async def rates(bench: Bench, events: int, rounds: int) -> dict[str, Any]:
    """Each round with one worker and with two, on the same events."""
    topic, dsn = bench.topic(1), await bench.database()
    settings = bench.settings(topic, dsn, jobs={"topic": f"jobs-{secrets.token_hex(4)}"})
    config = config_file(bench, settings, dsn, topic, jobs=settings.jobs.model_dump(mode="json"))
    figures: dict[int, list[float]] = {1: [], 2: []}
    try:
        async with open_library(settings, writer="bench") as library:
            await seed(library, events)
            for number in range(rounds):
                for count, measured in figures.items():
                    async with workers(config, count):
                        rate, took_part = await one(library, settings)
                    print(f"  round {number} {count} workers ({took_part} took part) {rate:8.0f} events/s", file=sys.stderr)
                    measured.append(rate)
    finally:
        await bench.drop(dsn)
    return {
        "re-encryption, one worker, events/s": figures[1],
        "re-encryption, two workers, events/s": figures[2],
        "re-encryption, two workers / one": [two / alone for two, alone in zip(figures[2], figures[1], strict=True)],
    }
