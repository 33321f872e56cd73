"""On the shared stack: a migrated database, and a library opened from a configuration of its own."""

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from sidecar import Library, open_library
from sidecar.kms.file import create_key_file
from sidecar.postgres import migrations
from sidecar.postgres.connection import Connection, connected
from sidecar.settings import Settings, load
from sidecar.testing import control_plane as kit
from sidecar.testing.local_stack import LocalStack


@pytest.fixture
async def connection(database: str) -> AsyncIterator[Connection]:
    """To a migrated database of the test's own."""
    async with connected(database) as opened:
        await migrations.migrate(opened)
        yield opened


@pytest.fixture
def settings(local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]) -> Settings:
    name = unique("lib")
    create_key_file(tmp_path / "kek")
    document = kit.document(
        name, local_stack.bootstrap_servers, database, kms={"uri": "file:./kek"}, audit={"topic": f"{name}.audit"},
        classes=[{"class": "CartData", "when": {"stream": "cart-*"}}, {"class": "Person", "when": {"stream": "person-*"}}],
    )  # fmt: skip
    (tmp_path / "sidecar.yaml").write_text(json.dumps(document))
    return load(tmp_path / "sidecar.yaml")


@pytest.fixture
async def library(settings: Settings) -> AsyncIterator[Library]:
    async with open_library(settings, writer="library-test") as opened:
        yield opened
