"""Promise: a shred does not wait for an instance that is dead or cut off; it is fenced, named on the receipt, and what it still does counts for nothing.

(One that is stopped: test_shred_and_rotate_under_traffic.)
"""

import asyncio
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from sidecar.core.model import Scope
from sidecar.core.view import guard_stripe
from tests.acceptance.test_residue import reconfigured
from tests.acceptance.test_shred_and_rotate_under_traffic import strays, traffic, warm
from tests.acceptance.world import World, until

ACME = Scope.of_tenant("acme")
HOLDS = """SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE l.locktype = 'advisory' AND l.classid = 1 AND l.objid = $1
  AND l.mode = 'ShareLock' AND l.granted AND a.datname = current_database() AND a.state = 'idle'"""


class Wire:
    """A TCP connection to Postgres that can be cut: while `open` is not set, nothing passes and nobody is told."""

    def __init__(self, host: str, port: int) -> None:
        self._to, self.open, self.port = (host, port), threading.Event(), 0
        self.open.set()

    @contextmanager
    def laid(self) -> Iterator["Wire"]:
        up, thread = threading.Event(), threading.Thread(target=lambda: asyncio.run(self._serve(up)))
        thread.start()
        up.wait(120)
        try:
            yield self
        finally:
            self.open.set()
            self._loop.call_soon_threadsafe(self._stop.set)
            thread.join(10)

    async def _serve(self, up: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with await asyncio.start_server(self._accepted, "127.0.0.1", 0) as server:
            self.port = server.sockets[0].getsockname()[1]
            up.set()
            await self._stop.wait()
        # asyncio.run cancels what is left; each connection closes its two ends

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await asyncio.open_connection(*self._to)
        try:
            await asyncio.gather(self._pump(reader, onward_writer), self._pump(onward_reader, writer))
        except OSError:
            pass
        finally:
            for end in (writer, onward_writer):
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            while not self.open.is_set():  # noqa: ASYNC110 (set from another thread)
                await asyncio.sleep(0.002)
            writer.write(data)
            await writer.drain()
        writer.close()


def seconds(receipt: dict[str, Any]) -> float:
    """From the acceptance to the point from which nothing can be read: measured, not asserted."""
    return (datetime.fromisoformat(receipt["inaccessible_at"]) - datetime.fromisoformat(receipt["accepted_at"])).total_seconds()


def test_a_dead_instance_is_fenced_and_named(world: World) -> None:
    world.control(wait=False)
    dead = world.run()
    world.planes[0].wait_ready()
    with traffic(world):
        warm(world)
        dead.signal(signal.SIGKILL)
        dead.process.wait()
        receipt = world.carry_out("shred", ACME)
    print(f"accepted to inaccessible: {seconds(receipt):.2f} s")
    assert [(i["instance_id"], i["outcome"]) for i in receipt["instances"]] == [(f"{world.name}-one", "fenced")]
    world.run()  # its successor, with the same id
    world.settle()
    assert strays(world, ACME, receipt) == []
    assert {row["status"] for row in world.events("globex")} == {"ok"}
    assert sum(world.sent.values()) == world.value("SELECT (SELECT count(*) FROM messages) + (SELECT count(*) FROM refusals)")


def test_an_instance_that_is_cut_off_from_postgres_is_fenced_and_what_it_commits_later_is_void(make_world: Callable[..., World]) -> None:
    world = make_world()
    parts = urlsplit(world.dsn)
    with Wire(parts.hostname or "127.0.0.1", parts.port or 5432).laid() as wire:
        through = parts._replace(netloc=f"{parts.username}@127.0.0.1:{wire.port}").geturl()
        document = json.loads(world.config.read_text())
        reconfigured(world, postgres=document["postgres"] | {"dsn_data": through})
        world.both()
        with traffic(world):
            warm(world)

            def cut_with_the_guard() -> bool:
                """Cut the wire; mend it unless the guard of the tenant is on the other side."""
                wire.open.clear()
                time.sleep(0.01)  # what was under way has arrived
                if world.value(HOLDS, guard_stripe("acme")):
                    return True
                wire.open.set()
                time.sleep(0.003)
                return False

            until(cut_with_the_guard, "the guard in the hands of an instance that is cut off")
            receipt = world.carry_out("shred", ACME)
        print(f"accepted to inaccessible: {seconds(receipt):.2f} s")
        assert [(i["instance_id"], i["outcome"]) for i in receipt["instances"]] == [(f"{world.name}-one", "fenced")]
        wire.open.set()
        world.settle()  # it recovers by itself
        assert strays(world, ACME, receipt) == []
        assert {row["status"] for row in world.events("globex")} == {"ok"}
        assert sum(world.sent.values()) == world.value("SELECT (SELECT count(*) FROM messages) + (SELECT count(*) FROM refusals)")
        world.close()
