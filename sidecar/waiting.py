"""How the processes of a deployment wait: for what cannot be reached, and for what may be woken."""

import asyncio
from contextlib import suppress
from typing import Final

POLL_SECONDS: Final = 1.0
"""How late a wake-up that got lost is made good."""


class Backoff:
    """0.1 s, doubling to 5 s."""

    def __init__(self) -> None:
        self._next = 0.1

    async def wait(self) -> None:
        pause, self._next = self._next, min(5.0, self._next * 2)
        await asyncio.sleep(pause)


async def woken(event: asyncio.Event) -> None:
    """Once it is set, or POLL_SECONDS have passed."""
    with suppress(TimeoutError):
        async with asyncio.timeout(POLL_SECONDS):  # not wait_for: woken and cancelled at once, it would swallow the cancellation
            await event.wait()
