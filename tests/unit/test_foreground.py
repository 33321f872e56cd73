"""What goes on behind the commands stands back while one is under way, and for a while at a time only."""

import asyncio
import time

import pytest

from sidecar.steps import Foreground


@pytest.fixture
def foreground(monkeypatch: pytest.MonkeyPatch) -> Foreground:
    monkeypatch.setattr(Foreground, "PATIENCE_SECONDS", 30.0)
    return Foreground()


async def test_work_stands_back_until_every_command_is_through(foreground: Foreground) -> None:
    seen: list[str] = []

    async def work() -> None:
        await foreground.let_pass()
        seen.append("loop")

    async def scan() -> None:
        await asyncio.to_thread(foreground.stand_back)
        seen.append("thread")

    with foreground.command():
        with foreground.command():
            tasks = [asyncio.create_task(work()), asyncio.create_task(scan())]
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.1)
        seen.append("commands")
    await asyncio.gather(*tasks)
    assert seen[0] == "commands"
    assert sorted(seen[1:]) == ["loop", "thread"]


async def test_without_a_command_nothing_waits(foreground: Foreground) -> None:
    started = time.monotonic()
    await foreground.let_pass()
    foreground.stand_back()
    assert time.monotonic() - started < foreground.PATIENCE_SECONDS / 2


async def test_nobody_stands_back_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Foreground, "PATIENCE_SECONDS", 0.05)
    foreground = Foreground()
    with foreground.command():
        async with asyncio.timeout(30):
            await foreground.let_pass()
            await asyncio.to_thread(foreground.stand_back)
        assert not foreground._quiet.is_set()
