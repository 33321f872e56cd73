"""Kafka, Postgres and the KMS go away under traffic and come back; a guard session is cut between store and view. Nothing lost, nothing twice."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sidecar.core.errors import StoreUnavailable
from sidecar.pipeline import Pipeline, Ports
from sidecar.testing import local_stack as stacks
from sidecar.testing.local_stack import LocalStack
from sidecar.work import Work
from tests.acceptance import harness
from tests.acceptance.harness import Instance, World, plane, query, until


@pytest.fixture
async def private(own_stack: LocalStack, tmp_path: Path) -> World:
    """On a broker and a database that the test may kill."""
    world = World(tmp_path, own_stack.bootstrap_servers, own_stack.dsn, "outage")
    await world.prepare()
    return world


@pytest.fixture
async def world(local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]) -> World:
    world = World(tmp_path, local_stack.bootstrap_servers, database, unique("o"))
    await world.prepare()
    return world


@asynccontextmanager
async def under_traffic(world: World, events: int, per_second: float) -> AsyncIterator[Instance]:
    """The block runs beside traffic and an instance; after it both cursors come to the end."""
    with world.start("a") as a:
        traffic = asyncio.create_task(asyncio.to_thread(world.publish, events, per_second=per_second))
        await until(world.stored, "a stores")
        yield a
        await traffic
        await world.settled()
        assert a.process.poll() is None
        assert a.stop() == 0
    await world.check()


async def test_kafka_killed_and_restarted_under_traffic(private: World, own_stack: LocalStack) -> None:
    async with under_traffic(private, 4000, per_second=500):
        for pause in (0.2, 3.0):
            await asyncio.to_thread(stacks.kill_kafka, own_stack.dir)
            await asyncio.sleep(pause)
            await asyncio.to_thread(stacks.start_kafka, own_stack.dir)
            await asyncio.sleep(1)


async def test_postgres_killed_and_restarted_under_traffic(private: World, own_stack: LocalStack) -> None:
    async with under_traffic(private, 4000, per_second=500) as a:
        for pause in (0.2, 3.0):
            await asyncio.to_thread(stacks.kill_postgres, own_stack.dir)
            await asyncio.sleep(pause)
            await asyncio.to_thread(stacks.start_postgres, own_stack.dir)
            await asyncio.sleep(1)
        assert a.said("recover")


async def test_while_the_kms_is_away_nothing_is_written_for_a_new_tenant_and_its_events_wait(world: World) -> None:
    away = world.key_file.with_suffix(".away")
    with world.start("a") as a:
        await asyncio.to_thread(world.publish, 60)
        await world.settled()
        before = await world.stored()
        world.key_file.rename(away)
        await asyncio.to_thread(world.publish, 60, tenants=5)  # two of them without a key
        await until(lambda: len(a.said("recover")) >= 4, "a waits, and tries again")
        written = await harness.query_all(world.dsn, "SELECT DISTINCT tenant_id FROM messages")
        assert {row["tenant_id"] for row in written} == {"tenant-0", "tenant-1", "tenant-2"}
        assert await world.stored() == before  # the whole partition waits: order is kept
        assert (
            not [error for error in ("UnknownKey", "KeyShredded") if error in a.log.read_text()]
            and await query(world.dsn, "SELECT count(*) FROM dead_letters") == 0
        )
        away.rename(world.key_file)
        await world.settled()
        assert a.process.poll() is None
    await world.check()


class CutBetweenStoreAndView(Pipeline):
    """Its guard session is ended three times between the store's commit and the view's."""

    dsn = ""
    cuts = 0

    async def _project(self, work: Work) -> None:
        if work.rows.count and self.cuts < 3:
            self.cuts += 1
            pid = self.ports.session.pid
            assert await query(self.dsn, "SELECT pg_terminate_backend($1, 5000)", pid)
        await super()._project(work)


async def test_a_guard_session_that_is_cut_between_store_and_view_loses_and_repeats_nothing(world: World) -> None:
    CutBetweenStoreAndView.dsn = world.dsn
    async with plane(world, "a", CutBetweenStoreAndView) as a:
        first = a.ports.session.pid
        await asyncio.to_thread(world.publish, 1500)
        await world.settled()
        assert a.cuts == 3 and a.ports.session.pid != first
    await world.check()


class ForgetsTheView(Pipeline):
    """The defect: fails between store and view, and goes on from the store's cursor alone."""

    failed = False

    async def _project(self, work: Work) -> None:
        if work.rows.count and not self.failed:
            self.failed = True
            raise StoreUnavailable("a test")
        await super()._project(work)

    def __init__(self, ports: Ports) -> None:
        super().__init__(ports)
        self._replay.load = nothing_to_replay  # type: ignore[method-assign]


async def nothing_to_replay(work: Work) -> None:
    return None


async def test_control_resuming_from_the_store_alone_loses_view_records(world: World) -> None:
    async with plane(world, "a", ForgetsTheView):
        await asyncio.to_thread(world.publish, 300)
        await world.settled()
    faults = await world.faults()
    assert faults.lost_in_view and not faults.lost_in_store
