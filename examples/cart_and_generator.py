"""One application, two modules: carts in the plain store, a generator of letters, which holds names, in the encrypted one.

    python examples/cart_and_generator.py app/sidecar.yaml

Neither module knows of encryption. What differs is the store that it is given, so the line that may hold personal data is drawn once, in `main`.
"""

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path

from sidecar import Event, EventStore, NewEvent, load, open_library


@dataclass(frozen=True)
class Carts:
    store: EventStore

    async def add(self, cart: str, item: str, quantity: int, *, tenant: str) -> None:
        added = NewEvent(type="ItemAdded", data={"item": item, "quantity": quantity})
        await self.store.append_to_stream(f"cart-{cart}", [added], tenant=tenant, stream_class="CartData")

    async def items(self, cart: str, *, tenant: str) -> dict[str, int]:
        def add(items: dict[str, int], event: Event) -> dict[str, int]:
            return items | {event.data["item"]: items.get(event.data["item"], 0) + event.data["quantity"]}

        empty: dict[str, int] = {}
        return (await self.store.aggregate_stream(f"cart-{cart}", add, empty, tenant=tenant)).state


@dataclass(frozen=True)
class Generator:
    store: EventStore

    async def create(self, letter: str, name: str, text: str, *, tenant: str) -> None:
        created = NewEvent(type="LetterCreated", data={"name": name, "text": text})
        await self.store.append_to_stream(f"letter-{letter}", [created], tenant=tenant, stream_class="UserPersonalData")

    async def letter(self, letter: str, *, tenant: str) -> str:
        def write(_: str, event: Event) -> str:
            return f"Dear {event.data['name']},\n{event.data['text']}"

        return (await self.store.aggregate_stream(f"letter-{letter}", write, "", tenant=tenant)).state


async def main(config: Path, tenant: str = "acme") -> None:
    async with open_library(load(config)) as library:
        carts, generator = Carts(library.plain), Generator(library.store)
        await carts.add("1", "book", 2, tenant=tenant)
        await generator.create("1", "Jane Doe", "your books are on their way.", tenant=tenant)
        print(await carts.items("1", tenant=tenant))
        print(await generator.letter("1", tenant=tenant))
        for stored in (await library.plain.read_stream("letter-1", tenant=tenant)).events:
            if isinstance(stored, Event):
                print("in the database:", stored.data[:40], "…")  # ks1.…: an envelope


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
