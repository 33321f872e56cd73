"""Worlds: a topic set, a database and a deployment per test (`world`), or per module (`shared_world`, with a data plane that runs)."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sidecar.testing.local_stack import LocalStack
from tests.acceptance.world import World, build


@pytest.fixture
def make_world(
    local_stack: LocalStack, make_database: Callable[[], str], tmp_path: Path, unique: Callable[[str], str]
) -> Iterator[Callable[..., World]]:
    """A function that makes a world (see `world.build`); its processes are gone at the end."""
    made: list[World] = []

    def make(**changes: object) -> World:
        made.append(build(local_stack, make_database(), tmp_path / f"world-{len(made)}", unique("w"), **changes))
        return made[-1]

    yield make
    for world in made:
        world.close()


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()
