"""15. A decrypt that starts after the receipt, from any of three instances, a reader or the command line, with every cache warm.

Each of the runs shreds one stream of which everybody holds the key: three data planes that have just sealed with it, two readers in processes
of an application, one that reads in the manner of `events list`. The moment the receipt is there, all of them try.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from sidecar import Event, Library, open_library
from sidecar.core.model import Scope, ScopeKind
from sidecar.key_management import KeyManagementService
from sidecar.testing import control_plane as kit
from tests.acceptance.harness import CAMPAIGN
from tests.acceptance.world import World

RUNS = 500 if CAMPAIGN else 100
TENANTS = 10
AT_ONCE = 4
"""As many commands as the control plane carries out side by side, of different tenants."""

Reader = Callable[[str, str], Awaitable[Sequence[Any]]]


def stream_of(run: int) -> tuple[str, str]:
    return f"t{run % TENANTS}", f"aes-{run}"


async def opened(reader: Reader, tenant: str, stream: str) -> int:
    """How many events of the stream it decrypts."""
    return sum(isinstance(held, Event) for held in await reader(tenant, stream))


def by_library(library: Library) -> Reader:
    async def read(tenant: str, stream: str) -> Sequence[Any]:
        return (await library.store.read_stream(stream, tenant=tenant)).events

    return read


def by_command_line(world: World) -> Reader:
    async def read(tenant: str, stream: str) -> Sequence[Any]:
        """A process of its own, where one can be had for the time it takes."""
        rows = await asyncio.to_thread(world.json, "events", "list", "--tenant", tenant, "--stream", stream)
        return [_event(row) for row in rows if row["status"] == "ok"]

    return read


def _event(row: dict[str, Any]) -> Event:
    return Event(
        tenant=row["tenant_id"], stream=row["stream_id"], position=row["position"], message_id=row["message_id"], type=row["type"], stream_class="",
        value=b"", key=None, timestamp_ms=0, headers=(), source=None,
    )  # fmt: skip


@asynccontextmanager
async def readers(world: World, count: int) -> AsyncIterator[list[Library]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(open_library(world.settings, writer=f"reader-{n}", max_connections=3)) for n in range(count)]


async def receipt(library: Library, world: World, scope: Scope) -> dict[str, Any]:
    """Shred; comes back the moment that the receipt is there."""
    command_id, raw = kit.command(world.settings, "shred", scope)
    await asyncio.to_thread(kit.send, world.settings, raw, key=scope.tenant)
    async with asyncio.timeout(120):
        while True:
            found = await library.plain.pool.fetchval("SELECT body FROM receipts WHERE command_id = $1 AND status = 'inaccessible'", command_id)
            if found is not None:
                return dict(found)
            await asyncio.sleep(0.005)


async def decrypts_after_the_receipt(world: World, libraries: Sequence[Library], run: int) -> list[str]:
    """Whoever still opens the stream's event; the stream was readable by all of them a moment before."""
    tenant, stream = stream_of(run)
    named = {f"reader {n}": by_library(library) for n, library in enumerate(libraries)}
    if run % 50 == 0:
        named["command line"] = by_command_line(world)
    warm = await asyncio.gather(*(opened(reader, tenant, stream) for reader in named.values()))
    assert set(warm) == {1}, f"{stream} is not readable before its shred: {dict(zip(named, warm, strict=True))}"
    await receipt(libraries[0], world, Scope(tenant=tenant, kind=ScopeKind.STREAM, id=stream))
    world.event(world.topic("in"), b"late", tenant=tenant, stream=stream, id=f"late-{run}")
    after = await asyncio.gather(*(opened(reader, tenant, stream) for reader in named.values()))
    return [who for who, count in zip(named, after, strict=True) if count]


async def campaign(world: World, libraries: Sequence[Library], runs: int) -> list[str]:
    for run in range(runs):
        tenant, stream = stream_of(run)
        world.event(world.topic("in"), b"secret", tenant=tenant, stream=stream)
    await asyncio.to_thread(world.settle)
    lanes = [range(lane, runs, AT_ONCE) for lane in range(AT_ONCE)]

    async def lane(numbers: Sequence[int]) -> list[str]:
        return [f"run {run}: {who}" for run in numbers for who in await decrypts_after_the_receipt(world, libraries, run)]

    found = [who for of_lane in await asyncio.gather(*(lane(numbers) for numbers in lanes)) for who in of_lane]
    await asyncio.to_thread(world.settle)
    return found


@pytest.fixture
async def wide(make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> World:
    """Its readers are deaf to the news of changed tenants: those may come late, they prove nothing."""

    async def deaf(*_: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("sidecar.library._forget_what_changed", deaf)
    world = make_world(partitions=6)
    await world.migrate()
    return world


async def test_15_nobody_decrypts_after_the_receipt(wide: World) -> None:
    world = wide
    await asyncio.to_thread(world.control)
    for name in ("one", "two", "three"):
        await asyncio.to_thread(world.run, name)
    async with readers(world, 3) as libraries:
        assert await campaign(world, libraries, RUNS) == []
        pool = libraries[0].plain.pool
        # the three instances: nothing was stored, so nothing sealed with a warm key, and nothing of it shown
        assert await pool.fetchval("SELECT count(*) FROM messages WHERE message_id LIKE 'late-%'") == 0
        assert await pool.fetchval("SELECT count(*) FROM refusals WHERE reason = 'scope_erased'") == RUNS
        owners = await pool.fetchval("SELECT count(DISTINCT owner) FROM partition_leases")
    assert owners == 3
    shown = [dict(message.headers() or ()).get("ce_id", b"") for message in world.records(world.topic("view"))]
    assert not [message_id for message_id in shown if message_id.startswith(b"late")]


class Trusting(KeyManagementService):
    """Asks nobody whether what it has in hand still holds."""

    @asynccontextmanager
    async def guard(self, tenant: str) -> AsyncIterator[int | None]:
        yield self._opening[tenant][0]


async def test_15_control_a_reader_that_trusts_its_cache_decrypts_after_the_receipt(wide: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world = wide
    await asyncio.to_thread(world.control)
    await asyncio.to_thread(world.run)
    async with readers(world, 2) as libraries:
        keys = libraries[1].keys
        monkeypatch.setattr(keys, "guard", Trusting.guard.__get__(keys))
        found = await campaign(world, libraries, 4)
    assert {who.partition(": ")[2] for who in found} == {"reader 1"}


def test_the_streams_of_a_campaign_are_all_different() -> None:
    assert len({stream_of(run) for run in range(500)}) == 500
