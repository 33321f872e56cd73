"""Worlds: a topic set, a database and a deployment per test (`world`), or per module (`shared_world`, with a data plane that runs)."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from sidecar.cli.init import write_configuration
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


@pytest.fixture
def application(local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]) -> Path:
    """The configuration that `sidecar init app` writes, under names of this test's own; signed commands and all."""
    file = write_configuration(tmp_path / "app", bootstrap_servers=local_stack.bootstrap_servers, dsn=database)
    document, name = yaml.safe_load(file.read_text()), unique("app")
    document |= {"deployment": name, "audit": {"topic": f"{name}.audit"}, "dead_letters": {"topic": f"{name}.dead"}, "http": {"port": 0}}
    document["jobs"] = {"topic": f"{name}.jobs"}
    document["control"] |= {part: f"{name}.{part}" for part in ("topic", "receipts", "ledger")}
    document["sources"][0]["topic"] = document["views"][0]["match"]["topics"][0] = f"{name}.users"
    document["views"][0]["topic"] = f"{name}.users.decrypted"
    file.write_text(yaml.safe_dump(document))
    return file
