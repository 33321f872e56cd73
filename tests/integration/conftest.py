"""A library opened from a configuration of its own, on the shared stack."""

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from sidecar import Library, open_library
from sidecar.kms.file import create_key_file
from sidecar.settings import Settings, load
from sidecar.testing.local_stack import LocalStack


@pytest.fixture
def settings(local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]) -> Settings:
    name = unique("lib")
    create_key_file(tmp_path / "kek")
    document: dict[str, Any] = {
        "deployment": name,
        "kafka": {"bootstrap_servers": local_stack.bootstrap_servers},
        "postgres": {"dsn": database},
        "kms": {"uri": "file:./kek"},
        "classes": [{"class": "CartData", "when": {"stream": "cart-*"}}, {"class": "Person", "when": {"stream": "person-*"}}],
        "control": {"topic": f"{name}.control", "receipts": f"{name}.receipts", "ledger": f"{name}.ledger", "allow_unsigned": True},
        "audit": {"topic": f"{name}.audit"},
        "http": {"port": 0},
    }
    (tmp_path / "sidecar.yaml").write_text(json.dumps(document))
    return load(tmp_path / "sidecar.yaml")


@pytest.fixture
async def library(settings: Settings) -> AsyncIterator[Library]:
    async with open_library(settings, writer="library-test") as opened:
        yield opened
