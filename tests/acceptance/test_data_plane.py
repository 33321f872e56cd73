"""The rules of the data path one by one, each on a real broker and database: guard, lease, cursors, heads, epochs, outcomes, stop."""

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from sidecar import telemetry
from sidecar.core.errors import StoreUnavailable
from sidecar.kafka.client import OutcomeUnknown
from sidecar.pipeline import Pipeline
from sidecar.testing.control_plane import read_topic
from sidecar.testing.local_stack import LocalStack
from sidecar.work import Work
from tests.acceptance import harness
from tests.acceptance.harness import World, plane, query, query_all, until


@pytest.fixture
async def world(local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]) -> World:
    client = {"session.timeout.ms": 2000, "heartbeat.interval.ms": 200}
    world = World(tmp_path, local_stack.bootstrap_servers, database, unique("d"), kafka={"client": client})
    await world.prepare()
    return world


# ── guard ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Watched(Pipeline):
    """Notes whether somebody else could take a tenant's guard while its batch is projected."""

    dsn = ""
    taken: list[bool]

    async def _project(self, work: Work) -> None:
        if work.rows.count:
            self.taken = [await query(self.dsn, "SELECT pg_try_advisory_lock(1, $1)", stripe) for stripe in work.stripes]
        await super()._project(work)


class ReleasesEarly(Watched):
    """The defect: the guard is given back with the Postgres transaction."""

    async def _project(self, work: Work) -> None:
        await self.ports.session.release(work.stripes)
        await super()._project(work)
        await self.ports.session.connection.fetch("SELECT pg_advisory_lock_shared(1, s) FROM unnest($1::int[]) s", work.stripes)


@pytest.mark.parametrize("pipeline", [Watched, ReleasesEarly])
async def test_the_guard_is_held_until_the_views_are_committed_and_given_back_then(world: World, pipeline: type[Watched]) -> None:
    Watched.dsn = world.dsn
    async with plane(world, "a", pipeline) as a:
        await asyncio.to_thread(world.publish, 100)
        await world.settled()
        assert len(a.taken) == 3
        assert any(a.taken) is (pipeline is ReleasesEarly)  # the control is seen
        await until(lambda: nobody_holds_the_guard(world), "the guard is given back")
    await world.check()


async def nobody_holds_the_guard(world: World) -> bool:
    sql = """SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 1
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""
    return bool(await query(world.dsn, sql) == 0)


# ── leases and cursors ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_owner_whose_lease_was_taken_by_one_out_of_the_group_is_fenced_and_takes_it_back(world: World) -> None:
    async with plane(world, "a") as a:
        await until(lambda: len(a.owned) == world.partitions, "a owns all")
        before = telemetry.fenced.labels("lease")._value.get()
        await query(world.dsn, "UPDATE partition_leases SET epoch = epoch + 1, owner = 'late'")
        await asyncio.to_thread(world.publish, 200)
        await world.settled()
        assert telemetry.fenced.labels("lease")._value.get() > before
    await world.check()


async def test_offsets_with_holes_of_aborted_transactions_are_passed_over_also_by_a_restart(world: World) -> None:
    async with plane(world, "a"):
        await asyncio.to_thread(world.publish, 300, aborted=3)
        await world.settled()
    await asyncio.to_thread(world.publish, 300, aborted=2)
    async with plane(world, "a"):
        await world.settled()
        await asyncio.to_thread(world.publish, 100, aborted=3)
        await world.settled()
    await world.check()


DIES_BETWEEN_STORE_AND_VIEW = """
import asyncio, os, signal, sys
from pathlib import Path
from sidecar.app import compose
from sidecar.pipeline import Pipeline
from sidecar.settings import load

class Dies(Pipeline):
    async def _project(self, work):
        if work.rows.count:
            os.kill(os.getpid(), signal.SIGKILL)
        await super()._project(work)

async def main():
    plane = await compose(load(Path(sys.argv[1])), sys.argv[2], pipeline_of=Dies)
    await plane.run(asyncio.Event())

asyncio.run(main())
"""


async def test_what_was_stored_and_not_projected_is_projected_from_the_store(world: World) -> None:
    await asyncio.to_thread(world.publish, 60, prefix="cart-")
    dying = world.launch("a", main=DIES_BETWEEN_STORE_AND_VIEW)
    assert await asyncio.to_thread(dying.process.wait, 120) == -signal.SIGKILL
    stored = await world.stored()
    assert stored and not read_topic(world.settings, world.view_topic)
    # so that it can be told where a view record came from
    await query(world.dsn, "UPDATE messages SET data = convert_to(replace(convert_from(data, 'UTF8'), 'xxx', 'yyy'), 'UTF8')")
    async with plane(world, "a"):
        await world.settled()
    await world.check()
    from_store = [m for m in read_topic(world.settings, world.view_topic) if b"yyy" in m.value()]
    assert len(from_store) == stored


# ── staged heads, tenant epochs ─────────────────────────────────────────────────────────────────────────────────────────


class FailsOnce(Pipeline):
    """Its second batch with records does not reach the store; the one behind it is sealed already."""

    batches = 0

    async def _commit(self, work: Work) -> None:
        if work.rows.count:
            self.batches += 1
            if self.batches == 2:
                await asyncio.sleep(0.2)
                raise StoreUnavailable("a test")
        await super()._commit(work)


class KeepsHeads(FailsOnce):
    """The defect: what a failed batch had staged stays."""

    async def _abandon(self) -> None:
        discard, self.ports.streams.discard_all = self.ports.streams.discard_all, lambda: None  # type: ignore[method-assign]
        await super()._abandon()
        self.ports.streams.discard_all = discard  # type: ignore[method-assign]


@pytest.mark.parametrize("pipeline", [FailsOnce, KeepsHeads])
async def test_a_batch_that_fails_leaves_no_gap_in_the_positions(world: World, pipeline: type[FailsOnce]) -> None:
    async with plane(world, "a", pipeline) as a:
        await asyncio.to_thread(world.publish, 2000)
        await world.settled()
        assert a.batches > 3
    assert bool((await world.faults()).disorder_in_store) is (pipeline is KeepsHeads)


class RotatesMeanwhile(Pipeline):
    """Between seal and store of the second batch every key is retired, as a rotation does it."""

    dsn = ""
    batches = rotated = 0

    async def _commit(self, work: Work) -> None:
        if work.rows.count:
            self.batches += 1
            if self.batches == 2:
                async with harness.session(self.dsn) as connection, connection.transaction():
                    await connection.execute("UPDATE encryption_keys SET is_active = false, retired_at = now()")
                    await connection.execute("UPDATE tenants SET epoch = epoch + 1")
                    RotatesMeanwhile.rotated = await connection.fetchval("SELECT max(global_position) FROM messages")
        await super()._commit(work)


class TrustsItsCache(RotatesMeanwhile):
    """The defect: what was sealed is stored, whatever happened to its tenant meanwhile."""

    def _verify(self, work: Work, states: Any, policy_version: int) -> None:
        pass


@pytest.mark.parametrize("pipeline", [RotatesMeanwhile, TrustsItsCache])
async def test_a_batch_that_was_sealed_before_a_rotation_is_sealed_again(world: World, pipeline: type[RotatesMeanwhile]) -> None:
    RotatesMeanwhile.dsn = world.dsn
    async with plane(world, "a", pipeline):
        await asyncio.to_thread(world.publish, 100)
        await world.settled()
        await asyncio.to_thread(world.publish, 1000)
        await world.settled()
    versions = await query_all(
        world.dsn,
        """SELECT DISTINCT get_byte(data_encrypted, 24) AS version FROM messages WHERE global_position > $1""",
        RotatesMeanwhile.rotated,
    )
    assert (1 in {row["version"] for row in versions}) is (pipeline is TrustsItsCache)
    if pipeline is RotatesMeanwhile:
        await world.check()


# ── a transaction whose outcome is not known ────────────────────────────────────────────────────────────────────────────


class Unanswered:
    """A producer whose third commit times out, after the broker did it or before it heard of it."""

    def __init__(self, producer: Any, *, done: bool) -> None:
        self._producer, self._done, self._commits = producer, done, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def commit_transaction(self, timeout: float) -> None:
        self._commits += 1
        if self._commits != 3 or self._done:
            self._producer.commit_transaction(timeout)
        if self._commits == 3:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT))


class RetriesBlindly(Pipeline):
    """The defect: an unknown outcome is taken for a failure."""

    async def _project(self, work: Work) -> None:
        try:
            await super()._project(work)
        except OutcomeUnknown:
            await self.ports.producer.reopen()
            await super()._project(work)


@pytest.mark.parametrize(("pipeline", "done"), [(Pipeline, True), (Pipeline, False), (RetriesBlindly, True)])
async def test_a_transaction_of_unknown_outcome_is_settled_by_the_cursors(world: World, pipeline: type[Pipeline], done: bool) -> None:
    async with plane(world, "a", pipeline) as a:
        unanswered = Unanswered(a.ports.producer._producer, done=done)
        a.ports.producer._producer = unanswered
        await asyncio.to_thread(world.publish, 2000)
        await world.settled()
        assert unanswered._commits == 3 and a.ports.producer._producer is not unanswered
    faults = await world.faults()
    if pipeline is RetriesBlindly:
        assert faults.twice_in_view
    else:
        assert not faults, str(faults)


# ── stop, topics made again ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_sigterm_ends_an_instance_with_exit_0_and_hands_its_partitions_over(world: World) -> None:
    with world.start("a") as a:
        traffic = asyncio.create_task(asyncio.to_thread(world.publish, 3000, per_second=600))
        await until(world.stored, "a stores")
        with world.start("b"):
            assert await asyncio.to_thread(a.stop) == 0
            await traffic
            await world.settled()
            states = await query_all(world.dsn, "SELECT instance_id, state FROM instances ORDER BY 1")
            assert [tuple(row) for row in states] == [("a", "stopped"), ("b", "running")]
    await world.check()


async def test_a_topic_that_was_deleted_and_made_again_is_another_source(world: World) -> None:
    async with plane(world, "a"):
        await asyncio.to_thread(world.publish, 120, prefix="old-")
        await world.settled()
        client = AdminClient({"bootstrap.servers": world.bootstrap, "log_level": 0})
        client.delete_topics([world.topic])[world.topic].result()
        await until(lambda: world.topic not in world.admin.describe([world.topic]), "the topic is gone")
        assert world.admin.create(world.topic, world.partitions, {})
        world.ends.clear()
        await asyncio.to_thread(world.publish, 1200, prefix="new-")  # more than before: the old offsets exist again
        await until(lambda: all_stored(world), "all are stored")
        await world.settled()
    await world.check()


async def all_stored(world: World) -> bool:
    return await world.stored() >= world.count
