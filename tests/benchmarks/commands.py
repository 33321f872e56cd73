"""From a command to its receipt, at full load: rotations, shreds small and large, and what an instance that does not let go costs."""

import asyncio
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from sidecar import telemetry
from sidecar.core.command import Command, compose, stored
from sidecar.core.model import Scope, ScopeKind
from sidecar.core.view import guard_stripe
from sidecar.postgres import commands
from sidecar.postgres.commands import Job
from sidecar.postgres.connection import open_pool, transaction
from sidecar.rotation import Rotation
from sidecar.steps import Steps, SystemClock
from tests.benchmarks import large_tenants
from tests.benchmarks.load import SMALL_STREAMS, Load, full_load
from tests.benchmarks.throughput import PARTITIONS, Bench

STREAMS_OF_LARGE = 30
"""Of the largest tenant, shredded one by one."""
SPARE = 40
"""Small tenants beyond those that are measured: of the ones that a failed instance holds, one is shredded."""
HELD = """
SELECT array_agg(objid::int) FROM pg_locks
WHERE locktype = 'advisory' AND classid = 1 AND objsubid = 2 AND granted
  AND pid = (SELECT guard_pid FROM instances WHERE instance_id = $1)"""


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def spread(name: str, values: list[float]) -> dict[str, Any]:
    return {f"{name} p50 ms": statistics.median(values), f"{name} p99 ms": percentile(values, 0.99)}


def progress(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def _of_small(count: int) -> Iterator[Scope]:
    """A stream of each small tenant."""
    return (Scope(tenant=f"small-{n}", kind=ScopeKind.STREAM, id=f"s{n % SMALL_STREAMS}") for n in range(count))


async def latencies(bench: Bench, shreds: int, sizes: list[int], rounds: int) -> dict[str, Any]:
    started = time.perf_counter()

    async def prepare(dsn: str) -> None:
        await large_tenants.seed_all(dsn, sizes)
        progress(f"tenants of {sizes} streams seeded in {time.perf_counter() - started:.0f} s")

    async with full_load(bench, shreds + SPARE, prepare) as load:
        figures = await rotations_in_database(load, shreds)
        await load.start_control()
        before, started = await load.stored(), time.perf_counter()
        figures |= await _small(load, shreds)
        figures["events/s meanwhile"] = (await load.stored() - before) / (time.perf_counter() - started)
        for size in sizes:
            figures |= await _previewed(load, size)
        figures |= await _one_stream(load, max(sizes))
        figures |= await _failed_instances(load, rounds)
        for size in sizes:
            ms, _ = await load.receipt("shred", Scope.of_tenant(large_tenants.name(size)), "inaccessible")
            figures[f"shred of {size:,} streams ms"] = ms
            progress(f"shred of {size:,} streams: {ms:.0f} ms")
    return figures


async def rotations_in_database(load: Load, count: int) -> dict[str, Any]:
    """The transaction that marks a stream's key: as a whole, and how long of it the guard was held. No control plane is there to take the command."""
    pool = await open_pool(load.dsn)
    steps: Any = Steps(pool, None, SystemClock(), None)  # type: ignore[arg-type]
    whole, held = [], []
    try:
        for scope in _of_small(count):
            job, command = await _accepted(load, pool, scope)
            held_before, started = telemetry.guard_seconds._sum.get(), time.perf_counter()
            await Rotation(steps).step(job, command)
            whole.append((time.perf_counter() - started) * 1e3)
            held.append((telemetry.guard_seconds._sum.get() - held_before) * 1e3)
        await load.connection.execute("UPDATE commands SET finished_at = now()")
    finally:
        await pool.close()
    progress(f"{count} rotations in the database: {statistics.median(whole):.0f} ms, under the guard {statistics.median(held):.1f} ms")
    return spread("rotate in the database", held) | spread("rotate in the database, wait for the guard and all", whole)


async def _accepted(load: Load, pool: Any, scope: Scope) -> tuple[Job, Command]:
    now, identity = datetime.now(UTC), uuid4()
    payload = compose(
        command_id=identity, audience=load.settings.deployment, op="rotate", scope=scope, reason="benchmark", requested_by="bench", ticket=None,
        issued_at=now, not_after=now, options={},
    )  # fmt: skip
    async with transaction(pool) as connection:
        receipt = {"receipt_id": str(uuid4()), "command_id": str(identity), "status": "accepted"}
        await commands.insert(
            connection, command_id=identity, op="rotate", tenant=scope.tenant, payload=payload, digest=b"", issuer="bench", status="accepted",
            facts={}, receipt=receipt, at=now,
        )  # fmt: skip
    job = Job(command_id=identity, op="rotate", tenant=scope.tenant, payload=payload, step=None, facts={}, received_at=now)
    return job, stored(payload)


async def _small(load: Load, count: int) -> dict[str, Any]:
    rotated = [(await load.receipt("rotate", scope, "done"))[0] for scope in _of_small(count)]
    progress(f"{count} rotations: {statistics.median(rotated):.0f} ms")
    shredded = [(await load.receipt("shred", Scope.of_tenant(f"small-{n}"), "inaccessible"))[0] for n in range(count)]
    progress(f"{count} shreds: {statistics.median(shredded):.0f} ms")
    return spread("rotate", rotated) | spread("shred of 10 streams", shredded)


async def _previewed(load: Load, size: int) -> dict[str, Any]:
    asked = [await load.receipt("shred", Scope.of_tenant(large_tenants.name(size)), "done", dry_run=True) for _ in range(3)]
    if any(body["streams"] != size for _, body in asked):
        raise RuntimeError("the dry run did not see every stream")
    progress(f"dry run of {size:,} streams: {[round(ms) for ms, _ in asked]} ms")
    return {f"dry run of {size:,} streams ms": [ms for ms, _ in asked]}


async def _one_stream(load: Load, size: int) -> dict[str, Any]:
    tenant = large_tenants.name(size)
    scopes = [Scope(tenant=tenant, kind=ScopeKind.STREAM, id=f"s{n * size // STREAMS_OF_LARGE + 1}") for n in range(STREAMS_OF_LARGE)]
    took = [(await load.receipt("shred", scope, "inaccessible"))[0] for scope in scopes]
    progress(f"shred of a stream among {size:,}: {statistics.median(took):.0f} ms")
    return spread(f"shred of a stream among {size:,}", took)


async def _failed_instances(load: Load, rounds: int) -> dict[str, Any]:
    """A second instance is stopped while it holds the guard of the tenant, or killed; the receipt must name it as fenced."""
    figures: dict[str, list[float]] = {"shred, one instance stopped ms": [], "shred, one instance killed ms": []}
    shredded: set[str] = {f"small-{n}" for n in range(load.small - SPARE)}
    for number in range(rounds):
        for name, how in zip(figures, (signal.SIGSTOP, signal.SIGKILL), strict=True):
            victim = f"victim-{number}-{how.name.lower()}"
            process = await load.start("run", "--instance-id", victim)
            await load.until("SELECT count(*) FROM partition_leases WHERE owner LIKE $1 || '%'", lambda n: n > 0, victim)
            tenant = await _strike(load, process.process, victim, how, shredded)
            shredded.add(tenant)
            ms, body = await load.receipt("shred", Scope.of_tenant(tenant), "inaccessible")
            figures[name].append(ms)
            outcomes = {instance["instance_id"]: instance["outcome"] for instance in body["instances"]}
            if outcomes.get(victim) != "fenced":
                raise RuntimeError(f"the receipt does not name the instance as fenced: {outcomes}")
            progress(f"{name}: {ms:.0f}")
            await process.end(signal.SIGKILL)
            await load.until("SELECT count(*) FROM partition_leases WHERE owner LIKE 'bench%'", lambda n: n == PARTITIONS)
    return dict(figures)


async def _strike(load: Load, process: Any, victim: str, how: signal.Signals, spent: set[str]) -> str:
    """Stop or kill it while it holds the guard of a tenant that is not shredded; -> that tenant."""
    for _ in range(1000):
        await asyncio.sleep(random.uniform(0.02, 0.1))
        process.send_signal(signal.SIGSTOP)
        held = set(await load.connection.fetchval(HELD, victim) or ())
        found = [name for n in range(load.small) if guard_stripe(name := f"small-{n}") in held and name not in spent]
        if found:
            if how is signal.SIGKILL:
                process.kill()
            return found[0]
        process.send_signal(signal.SIGCONT)
    raise RuntimeError("the instance never held the guard of a tenant that is left")
