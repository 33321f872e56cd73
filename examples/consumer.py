"""A subscription: each new customer gets a mail, once; one who was forgotten meanwhile gets none.

    python examples/consumer.py app/sidecar.yaml          until Ctrl-C; started again it goes on where it was

The handler gets `Event | Erased`. What it raises is tried again; after that the event is set aside by name, and the next one follows. A KMS or a
database that is away is waited for: it is not "erased". An event that was handled before its shred is not handed over again: what a handler
keeps of it (a row, a file, a mail) is the handler's own, to be deleted when its person is forgotten, or left out of a rebuild (read_model.py).
"""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from sidecar import Erased, Event, Library, load, open_library


async def welcome(library: Library, send: Callable[[str], Awaitable[None]], stop: asyncio.Event, *, tenant: str = "acme") -> None:
    async def handle(event: Event | Erased) -> None:
        match event:
            case Erased():
                print(f"position {event.position} of a stream was erased before its mail was sent")
            case Event(type="CustomerRegistered"):
                await send(event.data["name"])

    await library.consumer("welcome-mails", tenant=tenant, classes=["UserPersonalData"]).run(handle, stop)


async def main(config: Path) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    async def send(name: str) -> None:
        print(f"welcome, {name}!")

    async with open_library(load(config)) as library:
        await welcome(library, send, stop)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
