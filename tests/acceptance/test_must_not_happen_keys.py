"""What must not happen to keys (issue 4, E), by number. Each has a control: the same checker, red on a variant that lacks what prevents it."""

import asyncio
import threading
from datetime import timedelta
from typing import Any

import pytest

from sidecar.clean_up import Cleaned, CleanUp
from sidecar.pipeline import Pipeline, Ports
from sidecar.postgres.connection import Connection, open_pool
from sidecar.steps import SystemClock
from tests.acceptance.test_shred_and_rotate_under_traffic import Deaf, in_process
from tests.acceptance.world import World, blocking, until

# 13: a clean-up that destroys a version still in use by a warm cache


class Held(Deaf):
    """Deaf to news of its tenants, so that its cache stays warm; and stands still where `at` says, with the batch of the event `late`."""

    at = ""
    there, go_on = threading.Event(), threading.Event()

    def __init__(self, ports: Ports) -> None:
        super().__init__(ports)
        if self.at == "inside the transaction":
            insert = ports.session._insert_outcomes

            async def held(connection: Any, batch: Any, now: Any) -> None:
                await insert(connection, batch, now)
                if batch.rows.count and self.late:
                    await self._stand()

            ports.session._insert_outcomes = held  # type: ignore[method-assign]

    late = False

    async def _commit(self, work: Any) -> None:
        self.late = any(item.message_id == b"late" for item in work.items)
        if self.late and self.at == "before the transaction":
            await self._stand()
        await super()._commit(work)

    async def _stand(self) -> None:
        if not self.there.is_set():
            self.there.set()
            await asyncio.to_thread(self.go_on.wait, 120)


class Careless(CleanUp):
    """Neither waits for the batches under way nor has them sealed again."""

    async def _take_guard(self, connection: Connection, tenant: str) -> bool:
        return True

    async def _next_epoch(self, connection: Connection, tenant: str) -> None:
        pass


def clean(world: World, kind: type[CleanUp]) -> list[Cleaned]:
    async def run() -> list[Cleaned]:
        pool = await open_pool(world.dsn)
        try:
            return await kind(pool, SystemClock()).run(older_than=timedelta(0))
        finally:
            await pool.close()

    return blocking(run)


def lost(world: World) -> list[str]:
    """Events that cannot be read, though nobody shredded anything."""
    assert world.value("SELECT count(*) FROM erased_scopes") == 0
    return [f"{row['stream_id']}/{row['position']} reads {row['status']}" for row in world.events("acme") if row["status"] != "ok"]


def clean_up_beside_a_warm_cache(world: World, at: str, kind: type[CleanUp]) -> list[Cleaned]:
    """A key of a class whose events are gone, rotated by another instance, and still warm here; -> what the first clean-up did."""
    there, go_on = threading.Event(), threading.Event()
    pipeline: type[Pipeline] = type("OneHeld", (Held,), {"at": at, "there": there, "go_on": go_on})
    with in_process(world, pipeline):
        world.event(world.topic("in"), b"early", stream="class-1")
        world.settle()
        world.sql("UPDATE streams SET position = 1")
        world.sql("DELETE FROM messages")
        # as by count, of another instance: without the next epoch
        world.sql("UPDATE encryption_keys SET is_active = false, retired_at = now()")
        if at:
            world.event(world.topic("in"), b"late", stream="class-1", id="late")
            world.flush()
            assert there.wait(120)
        found = clean(world, kind)
        go_on.set()
        world.event(world.topic("in"), b"later", stream="class-1")
        world.settle()
    return found


PLACES = ["", "before the transaction", "inside the transaction"]


@pytest.mark.parametrize("at", PLACES, ids=["between batches", *PLACES[1:]])
def test_e13_a_clean_up_destroys_no_version_that_a_warm_cache_still_seals_with(world: World, at: str) -> None:
    found = clean_up_beside_a_warm_cache(world, at, CleanUp)
    assert [c.outcome for c in found] == ["busy" if at == "inside the transaction" else "destroyed"]
    assert lost(world) == []
    until(lambda: "busy" not in {c.outcome for c in clean(world, CleanUp)}, "a clean-up that is not held up")
    assert lost(world) == []
    assert {bytes(row["value"]) for row in world.events("acme")} == ({b"late", b"later"} if at else {b"later"})


@pytest.mark.parametrize("at", PLACES, ids=["between batches", *PLACES[1:]])
def test_e13_control_without_guard_and_epoch_events_are_lost(world: World, at: str) -> None:
    clean_up_beside_a_warm_cache(world, at, Careless)
    assert lost(world)
