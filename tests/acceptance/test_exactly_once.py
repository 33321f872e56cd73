"""Nothing lost, nothing twice, in order (I1 to I3): over kills and freezes of two instances at random, and over rebalances in mid-batch."""

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer

from sidecar.kafka import consumer as kafka_consumer
from sidecar.pipeline import Pipeline
from sidecar.testing.local_stack import LocalStack
from sidecar.work import Work
from tests.acceptance import harness
from tests.acceptance.harness import Instance, World, plane, until

KILLS, EVENTS = (30, 100_000) if harness.CAMPAIGN else (6, 20_000)
REBALANCES = 50 if harness.CAMPAIGN else 2
# A dead or frozen member's partitions go to the other instance within two seconds, and a rebalance is heard of at once.
IMPATIENT: dict[str, Any] = {"client": {"session.timeout.ms": 2000, "heartbeat.interval.ms": 200}}

# begin_batch without the comparison of epoch and cursor, and the store without its last line of defence
BREAK_THE_FENCE = """
DROP INDEX messages_source;
CREATE OR REPLACE FUNCTION begin_batch(stripes INT[], source_ids INT[], partitions INT[], epochs BIGINT[], starts BIGINT[], ends BIGINT[], tenant_ids TEXT[])
RETURNS TABLE (tenant_id TEXT, state TEXT, generation INT, epoch BIGINT) LANGUAGE plpgsql VOLATILE AS $$
BEGIN
  PERFORM pg_advisory_lock_shared(1, s) FROM unnest(stripes) s;
  UPDATE partition_leases l SET next_offset = greatest(l.next_offset, x.e)
    FROM unnest(source_ids, partitions, ends) x(source, part, e) WHERE l.source_id = x.source AND l.partition = x.part;
  RETURN QUERY SELECT NULL::TEXT, NULL::TEXT, NULL::INT, p.version FROM policy_version p
    UNION ALL SELECT t.tenant_id, t.state, t.generation, t.epoch FROM tenants t WHERE t.tenant_id = ANY (tenant_ids);
END $$;
"""


@pytest.fixture
async def world(local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]) -> World:
    world = World(tmp_path, local_stack.bootstrap_servers, database, unique("x"), kafka=IMPATIENT)
    await world.prepare()
    return world


# ── kills ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_nothing_is_lost_twice_or_out_of_order_over_kills_of_two_instances_at_random(world: World) -> None:
    dice = random.Random(7)
    instances = {name: world.launch(name) for name in ("a", "b")}
    try:
        for instance in instances.values():
            instance.wait_ready()
        traffic = asyncio.create_task(asyncio.to_thread(world.publish, EVENTS, per_second=EVENTS / KILLS / 2.2))
        frozen = 0
        for _ in range(KILLS):
            name = dice.choice("ab")
            await asyncio.sleep(dice.uniform(0.2, 3.0))
            if dice.random() < 0.25:  # a zombie: out of the group before it goes on with what it had in hand
                frozen += 1
                await freeze(instances[name], seconds=2.5)
            instances[name].kill()
            instances[name] = world.launch(name)
        await traffic
        await world.settled()
        assert frozen
    finally:
        harness.stop_all(instances.values())
    await world.check()


async def freeze(instance: Instance, seconds: float) -> None:
    instance.signal(signal.SIGSTOP)
    await asyncio.sleep(seconds)
    instance.signal(signal.SIGCONT)
    await asyncio.sleep(0.5)


class Overtaken(Pipeline):
    """Holds its first batch just before it is stored, until somebody else has taken the lease and stored the same records."""

    world: World
    held = gone_on = False

    async def revoked(self, partitions: list[Any], lost: bool) -> None:
        """A frozen process does not hear of it."""

    async def _commit(self, work: Work) -> None:
        if self.held or not work.rows.count:
            return await super()._commit(work)
        self.held = True

        async def overtaken() -> bool:
            assert self.source is not None
            await self.source.idle(0.1)
            rows = await harness.query_all(self.world.dsn, "SELECT partition, next_offset FROM partition_leases")
            ends = {row["partition"]: row["next_offset"] for row in rows}
            return any(ends[move.partition] >= move.end for move in work.moves.values())

        await until(overtaken, "another instance stores what this one holds")
        try:
            await super()._commit(work)
        finally:
            self.gone_on = True


async def overtake(world: World, pipeline: "type[Overtaken | Late]", records: int) -> None:
    """Instance a is overtaken by b with a batch in hand, goes on with it, and ends."""
    pipeline.world = world
    async with AsyncExitStack() as of_b:
        async with plane(world, "a", pipeline) as a:
            await until(lambda: len(a.owned) == world.partitions, "a owns all")
            await asyncio.to_thread(world.publish, records)
            await until(lambda: a.held, "a holds a batch")
            await of_b.enter_async_context(plane(world, "b"))
            await until(lambda: a.gone_on, "a goes on")
        await world.settled()


async def test_a_batch_that_was_overtaken_by_the_next_owner_is_fenced(world: World) -> None:
    await overtake(world, Overtaken, 200)
    await world.check()


async def test_control_without_the_fence_an_overtaken_batch_is_stored_twice(world: World) -> None:
    async with harness.session(world.dsn) as connection:
        await connection.execute(BREAK_THE_FENCE)
    await overtake(world, Overtaken, 200)
    assert (await world.faults()).twice_in_store


# ── rebalances ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Slow(Pipeline):
    """A batch takes its time between store and view, so that a revocation finds it there."""

    interrupted = 0
    seconds = 0.15

    async def revoked(self, partitions: list[Any], lost: bool) -> None:
        if self._inflight is not None and not self._inflight.done():
            Slow.interrupted += 1
        await super().revoked(partitions, lost)

    async def _project(self, work: Work) -> None:
        await asyncio.sleep(self.seconds)
        await super()._project(work)


@asynccontextmanager
async def outsider(world: World) -> AsyncIterator[None]:
    """Another member of the group, for as long as the block lasts: takes partitions and lets them go, processes nothing."""
    config = {"bootstrap.servers": world.bootstrap, "group.id": world.settings.group_id, "partition.assignment.strategy": "cooperative-sticky"}
    consumer = Consumer({**config, "auto.offset.reset": "error", "enable.auto.commit": False, "log_level": 2} | IMPATIENT["client"])
    gone = asyncio.Event()

    async def member() -> None:
        while not gone.is_set():
            await asyncio.to_thread(consumer.poll, 0.05)

    consumer.subscribe([world.topic], on_assign=lambda c, partitions: (c.incremental_assign(partitions), c.pause(partitions)))
    task = asyncio.create_task(member())
    try:
        await until(consumer.assignment, "the outsider has partitions")
        yield
    finally:
        gone.set()
        await task
        await asyncio.to_thread(consumer.close)


async def test_no_view_record_comes_twice_over_rebalances_in_mid_batch(world: World) -> None:
    Slow.interrupted = 0
    async with plane(world, "a", Slow) as a, plane(world, "b", Slow) as b:
        going = True

        async def traffic() -> None:
            while going:
                await asyncio.to_thread(world.publish, 50, per_second=400)

        publishing = asyncio.create_task(traffic())
        while Slow.interrupted < REBALANCES:
            async with outsider(world):
                await asyncio.sleep(0.1)
            await until(lambda: len(a.owned) + len(b.owned) == world.partitions, "all partitions are owned again")
        going = False
        await publishing
        await world.settled()
    await world.check()


class Late(Pipeline):
    """Holds its first stored batch until the next owner has completed its view, and projects it then."""

    world: World
    held = gone_on = False

    async def _project(self, work: Work) -> None:
        if self.held or not work.rows.count:
            return await super()._project(work)
        self.held = True
        ends = {at: end for at, (_, end) in work.ends.items()}

        async def overtaken() -> bool:
            assert self.source is not None
            await self.source.idle(0.1)
            committed = await asyncio.to_thread(self.world.committed)
            return any(committed.get(at, 0) >= end for at, end in ends.items())

        await until(overtaken, "another instance projects what this one holds")
        try:
            await super()._project(work)
        finally:
            self.gone_on = True


class LateWithMetadataOfNow(Late):
    """The defect: group metadata asked for when it is needed belongs to a generation in which the partition is somebody else's."""

    async def _project(self, work: Work) -> None:
        emit = self.ports.producer.emit

        async def with_metadata_of_now(outgoing: Any, offsets: Any, _captured: Any) -> None:
            assert self.source is not None
            await emit(outgoing, offsets, self.source._consumer.consumer_group_metadata())

        self.ports.producer.emit = with_metadata_of_now  # type: ignore[method-assign]
        await super()._project(work)
        self.ports.producer.emit = emit  # type: ignore[method-assign]


async def test_a_batch_that_ends_after_its_partitions_were_given_away_does_not_project(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_consumer, "RELEASE_SECONDS", 0.05)
    await overtake(world, Late, 40)
    await world.check()


async def test_control_with_group_metadata_taken_at_commit_the_view_gets_records_twice(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_consumer, "RELEASE_SECONDS", 0.05)
    await overtake(world, LateWithMetadataOfNow, 40)
    faults = await world.faults()
    assert faults.twice_in_view and not faults.twice_in_store
