"""What encryption costs an application: the decorated store against the same store undecorated, in paired rounds."""

import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import asyncpg

from sidecar import Library, NewEvent, PolicySpec, open_library
from tests.benchmarks.throughput import VALUE_BYTES, Bench

TENANT = "acme"
COMMITS, LARGE_COMMITS, READS = 25, 4, 20
"""In a turn: commits of one event and writer, commits of 100 events. In a round: reads of 1,000 events."""
TURNS = 30
"""Of each store in a round. They alternate quickly, so that what else the machine does falls on both alike."""
PADDING = "x" * (VALUE_BYTES - 90)

Append = Callable[[str, int], Awaitable[None]]
"""So many events to a stream, in one commit."""


def events(count: int) -> list[NewEvent]:
    return [NewEvent(type="UserUpdated", data={"email": "jane@example.org", "n": n, "padding": PADDING}) for n in range(count)]


def into(store: Any, stream_class: str) -> Append:
    batches = {count: events(count) for count in (1, 100)}

    async def append(stream: str, count: int) -> None:
        await store.append_to_stream(stream, batches[count], tenant=TENANT, stream_class=stream_class)

    return append


async def seconds(append: Append, streams: list[str], commits: int, count: int) -> float:
    """A writer for each stream."""

    async def write(stream: str) -> None:
        for _ in range(commits):
            await append(stream, count)

    started = time.perf_counter()
    await asyncio.gather(*map(write, streams))
    return time.perf_counter() - started


async def append_losses(library: Library, rounds: int) -> dict[str, list[float]]:
    """Percent of the undecorated store's events per second that are lost: the median of a round's turns; one value a round."""
    bare, sealed = into(library.plain, "Bare"), into(library.store, "Person")
    decorated_plain = into(library.store, "Plain")
    kinds: dict[str, tuple[Append, int, int, int]] = {
        "append loss, 1 event per commit, 1 writer %": (sealed, 1, COMMITS, 1),
        "append loss, 1 event per commit, 8 writers %": (sealed, 8, COMMITS, 1),
        "append loss, 100 events per commit %": (sealed, 1, LARGE_COMMITS, 100),
        "append loss, plain class %": (decorated_plain, 1, COMMITS, 1),
    }
    losses: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds + 1):  # the first round warms up and is not counted
        for kind, (name, (append, writers, commits, count)) in enumerate(kinds.items()):
            streams = {each: [f"s-{number}-{kind}-{each is bare}-{writer}" for writer in range(writers)] for each in (bare, append)}
            ratios = []
            for turn in range(TURNS + 1):
                took = {each: await seconds(each, streams[each], commits, count) for each in ((bare, append) if turn % 2 else (append, bare))}
                if turn:  # the first one makes the streams
                    ratios.append(took[bare] / took[append])
            if number:
                losses[name].append((1 - statistics.median(ratios)) * 100)
                print(f"  round {number} {name} {losses[name][-1]:.1f}", file=sys.stderr, flush=True)
    return losses


async def read_cost(library: Library, rounds: int) -> list[float]:
    """µs per event that opening adds to a read of 1,000, keys warm; one value a round."""
    for store, named, stream in ((library.plain, "Bare", "read-bare"), (library.store, "Person", "read-sealed")):
        for _ in range(10):
            await store.append_to_stream(stream, events(100), tenant=TENANT, stream_class=named)
    costs = []
    for number in range(rounds + 1):
        took: dict[str, list[float]] = {"read-bare": [], "read-sealed": []}
        for _ in range(READS):
            for store, stream in ((library.plain, "read-bare"), (library.store, "read-sealed")):
                started = time.perf_counter()
                read = await store.read_stream(stream, tenant=TENANT)
                took[stream].append(time.perf_counter() - started)
                if len(read.events) != 1000:
                    raise RuntimeError("not all events were read")
        if number:
            costs.append((statistics.median(took["read-sealed"]) - statistics.median(took["read-bare"])) * 1e3)
    return costs


@contextmanager
def statements() -> Iterator[list[str]]:
    """What is sent to Postgres by anybody in this process."""
    sent: list[str] = []
    execute = asyncpg.Connection._do_execute

    async def counted(self: Any, query: Any, *arguments: Any, **options: Any) -> Any:
        sent.append(str(query))
        return await execute(self, query, *arguments, **options)

    asyncpg.Connection._do_execute = counted
    try:
        yield sent
    finally:
        asyncpg.Connection._do_execute = execute


async def statements_of_append(library: Library) -> dict[str, int]:
    """Of 100 events to a stream that is warm."""
    out: dict[str, int] = {}
    for name, append in (("undecorated", into(library.plain, "Bare")), ("decorated", into(library.store, "Person"))):
        await append(f"count-{name}", 100)
        with statements() as sent:
            await append(f"count-{name}", 100)
        out[name] = len([query for query in sent if query != "SELECT"])  # that one asks for news of changed tenants, once a second
    return out


async def figures(bench: Bench, rounds: int) -> dict[str, Any]:
    dsn = await bench.database()
    try:
        async with open_library(bench.settings("bench-library", dsn), writer="bench") as library:
            plain = PolicySpec.model_validate({"class": "Plain", "encrypt": False})
            await library.policies.create_policy(plain, actor="bench", reason="benchmark")
            counted = await statements_of_append(library)
            more = {"SQL statements more per append of 100": counted["decorated"] - counted["undecorated"]}
            out = await append_losses(library, rounds) | {"read of 1,000 events, added µs per event": await read_cost(library, rounds)}
            return out | more
    finally:
        await bench.drop(dsn)
