"""A read model that is rebuilt after a shred: what was erased is left out knowingly, and the totals stay right.

    python examples/read_model.py app/sidecar.yaml

What must outlive a person stands in events that are not about the person: amounts in plain orders, under a customer's number; the name that
belongs to the number in an encrypted stream of its own. A shred takes the name and leaves the sum.
"""

import asyncio
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from sidecar import Cursor, Erased, Event, EventStore, NewEvent, Unreadable, load, open_library


async def register(store: EventStore, customer: str, name: str, *, tenant: str) -> None:
    registered = NewEvent(type="CustomerRegistered", data={"customer": customer, "name": name})
    await store.append_to_stream(f"customer-{customer}", [registered], tenant=tenant, stream_class="UserPersonalData")


async def order(store: EventStore, customer: str, cents: int, *, tenant: str) -> None:
    placed = NewEvent(type="OrderPlaced", data={"customer": customer, "cents": cents})
    await store.append_to_stream(f"cart-{customer}", [placed], tenant=tenant, stream_class="CartData")


@dataclass
class Sales:
    cents: Counter[str] = field(default_factory=Counter)
    names: dict[str, str] = field(default_factory=dict)
    erased: int = 0
    seen: int = 0

    def take(self, event: Event | Erased) -> None:
        self.seen += 1
        match event:
            case Erased():
                self.erased += 1  # who that was is nobody's business any more
            case Event(type="CustomerRegistered", data={"customer": customer, "name": name}):
                self.names[customer] = name
            case Event(type="OrderPlaced", data={"customer": customer, "cents": cents}):
                self.cents[customer] += cents

    def lines(self) -> list[str]:
        return [f"{self.names.get(customer, '(forgotten)')}: {cents / 100:.2f}" for customer, cents in sorted(self.cents.items())]


async def rebuild(store: EventStore, *, tenant: str) -> Sales:
    """From the first event on. An event that cannot be read is an error: a total without it would be wrong."""
    sales, place = Sales(), Cursor()
    while page := await store.read_all(after=place, tenant=tenant):
        for _, event in page:
            if isinstance(event, Unreadable):
                raise event.error
            sales.take(event)
        place = page[-1][0]
    return sales


async def caught_up(store: EventStore, events: int, *, tenant: str) -> Sales:
    """With at least so many. The global order is read up to the oldest transaction that is still open: what was just stored may take a moment."""
    sales = await rebuild(store, tenant=tenant)
    while sales.seen < events:
        await asyncio.sleep(0.05)
        sales = await rebuild(store, tenant=tenant)
    return sales


async def main(config: Path, tenant: str = "acme") -> None:
    async with open_library(load(config)) as library:
        for customer, name, cents in (("17", "Jane Doe", 4200), ("18", "John Roe", 1999), ("17", "Jane Doe", 800)):
            await register(library.store, customer, name, tenant=tenant)
            await order(library.store, customer, cents, tenant=tenant)
        print(*(await caught_up(library.store, 6, tenant=tenant)).lines(), sep="\n")
        await library.shredding.forget_stream_data("customer-17", tenant, reason="Art. 17 request")
        sales = await caught_up(library.store, 6, tenant=tenant)
        print(*sales.lines(), f"{sales.erased} events are erased", sep="\n")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
