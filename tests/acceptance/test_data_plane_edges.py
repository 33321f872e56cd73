"""The data path where something is taken from under it: records that vanish, views that take less than the source, revocations and stops at bad moments."""

import asyncio
import json
import secrets
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from sidecar import telemetry
from sidecar.app import compose
from sidecar.kafka import consumer as kafka_consumer
from sidecar.kafka.client import OutcomeUnknown
from sidecar.pipeline import Pipeline
from sidecar.testing.control_plane import read_topic
from sidecar.testing.local_stack import LocalStack
from sidecar.work import Work
from tests.acceptance import harness
from tests.acceptance.harness import World, plane, query, until
from tests.acceptance.test_data_plane import DIES_BETWEEN_STORE_AND_VIEW


@pytest.fixture
async def world(local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]) -> World:
    client = {"session.timeout.ms": 4000, "heartbeat.interval.ms": 200}
    world = World(tmp_path, local_stack.bootstrap_servers, database, unique("e"), kafka={"client": client})
    await world.prepare()
    return world


# ── stopping ──────────────────────────────────────────────────────────────────────────────────────────────────────────

NEVER_CLOSES = """
import sys, threading
import confluent_kafka

class Stuck(confluent_kafka.Consumer):
    def close(self):
        threading.Event().wait()

confluent_kafka.Consumer = Stuck
from sidecar.kafka import consumer
consumer.CLOSE_SECONDS = 0.5
from sidecar.cli import main
main(["--config", sys.argv[1], "run", "--instance-id", sys.argv[2]])
"""


async def test_a_stop_ends_also_where_the_consumer_does_not_close(world: World) -> None:
    """As librdkafka does now and then while an assignment is on its way."""
    stuck = world.launch("a", main=NEVER_CLOSES).wait_ready()
    try:
        assert await asyncio.to_thread(stuck.stop) == 0
        assert "is left behind" in stuck.log.read_text()
    finally:
        stuck.kill()


# ── records that are gone ───────────────────────────────────────────────────────────────────────────────────────────────


async def delete_records(world: World, ends: dict[int, int]) -> None:
    """What retention does, at once."""
    client = AdminClient({"bootstrap.servers": world.bootstrap, "log_level": 0})
    asked = client.delete_records([TopicPartition(world.topic, partition, offset) for partition, offset in ends.items()])
    for future in asked.values():
        await asyncio.to_thread(future.result)


async def stored_and_gone(world: World) -> None:
    """Events were stored, not projected, and are in the topic no more; others come after them."""
    await asyncio.to_thread(world.publish, 60)
    dying = world.launch("a", main=DIES_BETWEEN_STORE_AND_VIEW)
    assert await asyncio.to_thread(dying.process.wait, 120) == -signal.SIGKILL
    stored = await harness.query_all(world.dsn, "SELECT partition, next_offset FROM partition_leases WHERE next_offset > 0")
    assert stored and not read_topic(world.settings, world.view_topic)
    await delete_records(world, {row["partition"]: row["next_offset"] for row in stored})
    await asyncio.to_thread(world.publish, 60)


async def test_stored_events_whose_records_are_gone_are_projected_from_the_store(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.replay.CHUNK", 7)
    await stored_and_gone(world)
    async with plane(world, "a"):
        await world.settled()
    await world.check()


async def test_control_without_that_they_have_no_view_record(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(*_: Any) -> None:
        pass

    monkeypatch.setattr(Pipeline, "_project_vanished", nothing)
    await stored_and_gone(world)
    async with plane(world, "a"):
        await world.settled()
    faults = await world.faults()
    assert faults.lost_in_view and not faults.lost_in_store


async def test_records_that_go_before_they_are_read_do_not_leave_their_partition_standing(world: World) -> None:
    with world.start("a") as a:
        await asyncio.to_thread(world.publish, 40)
        await world.settled()
        a.signal(signal.SIGSTOP)
        await asyncio.to_thread(world.publish, 400, size=4000)
        await delete_records(world, {partition: end for (_, partition), end in world.ends.items()})
        a.signal(signal.SIGCONT)
        await asyncio.to_thread(world.publish, 40)
        await world.settled()
        newest = [ids[-1] for ids in world.expected.values()]
        assert await query(world.dsn, "SELECT count(*) FROM messages WHERE message_id = ANY ($1)", newest) == len(newest)


# ── views that take less ────────────────────────────────────────────────────────────────────────────────────────────────


async def publish_large(world: World, count: int, *, tenant: str = "tenant-0") -> list[str]:
    """Events that do not compress, larger than the view's topic takes; -> their ids."""
    producer = Producer({"bootstrap.servers": world.bootstrap, "log_level": 0})
    ids = []
    for n in range(count):
        message_id, stream = f"large-{secrets.token_hex(4)}", f"large-{n}"
        value = json.dumps({"id": message_id, "secret": secrets.token_hex(20_000)})
        headers = {"specversion": "1.0", "id": message_id, "source": "/test", "type": "t", "tenantid": tenant, "streamid": stream}
        producer.produce(world.topic, value, stream, n % world.partitions, headers=[(f"ce_{name}", text) for name, text in headers.items()])
        world.expected.setdefault((tenant, stream), []).append(message_id)  # type: ignore[attr-defined]
        ids.append(message_id)
    assert await asyncio.to_thread(producer.flush, 60) == 0
    return ids


async def test_a_record_that_the_views_broker_finds_too_large_is_a_dead_letter_and_the_others_go_on(world: World) -> None:
    world.admin.create(world.view_topic, 3, {"max.message.bytes": "5000"})
    async with plane(world, "a"):
        await asyncio.to_thread(world.publish, 100)  # small records, in batches that are too large
        large = await publish_large(world, 3)
        await asyncio.to_thread(world.publish, 100)
        await world.settled()
        await until(lambda: noted(world, 3), "all three are dead letters")
    faults = await world.faults()
    assert sorted(faults.lost_in_view) == sorted(large)
    assert not (faults.lost_in_store or faults.twice_in_view or faults.strangers)


async def noted(world: World, count: int) -> bool:
    return bool(await query(world.dsn, "SELECT count(*) FROM dead_letters WHERE reason = 'view_too_large'") == count)


class LosesItsPartitions(Pipeline):
    """They are revoked when a replay is about to be projected."""

    done = False

    async def _project(self, work: Work) -> None:
        if not work.stored_rows or self.done:
            return await super()._project(work)
        self.done, kept = True, dict(self.owned)
        self.owned.clear()
        try:
            await super()._project(work)
        finally:
            self.owned.update(kept)


async def test_a_replay_of_a_record_that_is_too_large_ends_also_without_its_lease(world: World) -> None:
    world.admin.create(world.view_topic, 3, {"max.message.bytes": "5000"})
    (large,) = await publish_large(world, 1)
    dying = world.launch("a", main=DIES_BETWEEN_STORE_AND_VIEW)
    assert await asyncio.to_thread(dying.process.wait, 120) == -signal.SIGKILL
    async with plane(world, "a", LosesItsPartitions) as a:
        await asyncio.to_thread(world.publish, 40)
        await world.settled()
        assert a.done
    assert (await world.faults()).lost_in_view == [large]
    assert await noted(world, 1)


# ── bad moments ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Stubborn:
    """A consumer that cannot seek as long as it has all partitions."""

    def __init__(self, consumer: Any, partitions: int) -> None:
        self._consumer, self._partitions = consumer, partitions
        self.refused = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._consumer, name)

    def seek(self, target: TopicPartition) -> None:
        if len(self._consumer.assignment()) == self._partitions:
            self.refused += 1
            raise KafkaException(KafkaError(KafkaError._STATE))
        self._consumer.seek(target)


async def test_a_revocation_inside_a_seek_is_passed_over(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_consumer, "SEEK_SECONDS", 60.0)
    async with plane(world, "a") as a:
        await until(lambda: len(a.owned) == world.partitions, "a owns all")
        await asyncio.to_thread(world.publish, 40)
        await world.settled()
        stubborn = a.source._consumer = Stubborn(a.source._consumer, world.partitions)
        a.reclaim(list(a.owned))
        await until(lambda: stubborn.refused, "a seeks")
        async with plane(world, "b"):
            await asyncio.to_thread(world.publish, 200)
            await world.settled()
    await world.check()


class StopsMeanwhile(Pipeline):
    """Is told to stop when the outcome of a transaction is not known; `away`: nor can it be found out."""

    stop: asyncio.Event
    away = True

    async def _project(self, work: Work) -> None:
        if work.rows.count:
            self.stop.set()
            if self.away:
                self.ports.producer.reopen = self._unanswered  # type: ignore[method-assign]
            raise OutcomeUnknown("a test")
        await super()._project(work)

    async def _unanswered(self) -> None:
        raise OutcomeUnknown("a test")


@pytest.mark.parametrize(("away", "state"), [(True, "running"), (False, "stopped")])
async def test_a_stop_while_an_outcome_is_unknown_is_not_on_record_as_stopped(world: World, away: bool, state: str) -> None:
    """A shred then fences the instance, as one that died."""
    StopsMeanwhile.stop, StopsMeanwhile.away = asyncio.Event(), away
    composed = await compose(world.settings, "a", pipeline_of=StopsMeanwhile)
    running = asyncio.create_task(composed.run(StopsMeanwhile.stop))
    await asyncio.to_thread(world.publish, 40)
    await asyncio.wait_for(running, 120)
    assert await query(world.dsn, "SELECT state FROM instances WHERE instance_id = 'a'") == state
    async with plane(world, "a"):
        await world.settled()
    await world.check()


# ── what is counted ─────────────────────────────────────────────────────────────────────────────────────────────────────


def counted(name: str, **labels: str) -> float:
    return telemetry.registry.get_sample_value(name, labels) or 0.0


async def test_view_records_streams_on_several_partitions_and_ciphers_in_hand_are_counted(world: World) -> None:
    projected, several = counted("sidecar_events_projected_total", view="users"), counted("sidecar_streams_on_several_partitions_total")
    async with plane(world, "a"):
        await asyncio.to_thread(world.publish, 120)
        await world.settled()
        assert counted("sidecar_events_projected_total", view="users") - projected == 120
        assert counted("sidecar_streams_on_several_partitions_total") == several
        assert counted("sidecar_key_cache_entries") == 12
        world.partitions = 3  # the producer's partitioning changes: the streams move
        await asyncio.to_thread(world.publish, 120)
        await world.settled()
        assert counted("sidecar_streams_on_several_partitions_total") > several
