"""Promise: docs/migration.md can be followed: its maps import from tables as they are, and its code takes over what an application encrypted."""

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from cryptography.fernet import Fernet

from sidecar import Library, load, open_library
from sidecar.import_map import ImportMap
from sidecar.postgres.connection import connected
from tests.acceptance.pages import DOCS, blocks, run
from tests.integration.test_importing import EMMETT, EVENTSOURCING, emmett_rows

TEXT = (DOCS / "migration.md").read_text()
OWN = """
CREATE SCHEMA legacy;
CREATE TABLE legacy.orders (id BIGSERIAL PRIMARY KEY, tenant TEXT NOT NULL, customer TEXT NOT NULL, version INT NOT NULL, kind TEXT NOT NULL,
  payload JSONB, context JSONB, created_at TIMESTAMP NOT NULL DEFAULT now(), deleted BOOLEAN NOT NULL DEFAULT false);
CREATE TABLE legacy.customers (customer INT, version INT, event_id TEXT, kind TEXT, data JSONB, PRIMARY KEY (customer, version));
"""


@pytest.fixture
async def library(application: Path) -> AsyncIterator[Library]:
    async with open_library(load(application)) as opened:
        yield opened


async def fill(dsn: str, old: Fernet) -> None:
    async with connected(dsn) as connection:
        for statements in (OWN, EMMETT, EVENTSOURCING):
            await connection.execute(statements)
        orders = [
            ("acme", "jane", 1, "book", False),
            ("zeta", "joe", 0, "ink", False),
            ("acme", "joe", 1, "hat", True),
            ("acme", "jane", 3, "pen", False),
        ]
        orders.append(("zeta", "joe", 5, "map", False))
        for tenant, customer, version, item, deleted in orders:
            await connection.execute(
                "INSERT INTO legacy.orders (tenant, customer, version, kind, payload, deleted) VALUES ($1, $2, $3, 'Ordered', $4, $5)",
                tenant, customer, version, {"item": item}, deleted,
            )  # fmt: skip
        for version, email in ((1, "jane@example.org"), (2, "doe@example.org")):
            sealed = {"email": old.encrypt(email.encode()).decode(), "plan": "pro"}
            await connection.execute("INSERT INTO legacy.customers VALUES (7, $1, $2, 'Changed', $3)", version, f"c7-{version}", sealed)
        for version in (1, 2):
            await connection.execute("INSERT INTO stored_events VALUES ($1, $2, 'dogs:Dog.Named', $3)", UUID(int=9), version, b'{"name":"Fido"}')
    await emmett_rows(dsn, [("user-1", n, {"n": n}) for n in (1, 2, 3)])


async def test_the_page_can_be_followed(application: Path, library: Library) -> None:
    folder, key = application.parent, Fernet.generate_key()
    (folder / "fernet.key").write_bytes(key)
    await fill(load(application).postgres.for_role("data"), Fernet(key))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    names: dict[str, Any] = {
        "library": library,
        "folder": folder,
        "environment": dict(os.environ) | {"PATH": path, "SIDECAR_CONFIG": str(application)},
    }
    await run(TEXT, application, names)
    verified = await library.plain.pool.fetch("SELECT name FROM imports WHERE verified_at IS NOT NULL ORDER BY name")
    assert [row["name"] for row in verified] == ["dogschool", "orders", "shop"]
    streams = await library.plain.pool.fetch("SELECT tenant_id || ' ' || stream_id AS name, position FROM streams ORDER BY 1")
    assert {row["name"]: row["position"] for row in streams} == {
        "acme jane": 2, "zeta joe": 2, "acme user-1": 3, f"acme {UUID(int=9)}": 2, "acme customer-7": 2,
    }  # fmt: skip
    clear = await library.plain.pool.fetch("SELECT data FROM messages WHERE data IS NOT NULL")
    assert clear, "the rest of a document stays JSON"
    assert not any(b"example.org" in row["data"] for row in clear)


def test_the_maps_of_the_page_are_those_that_are_shipped() -> None:
    shipped = {
        file.stem: ImportMap.model_validate(yaml.safe_load(file.read_text())) for file in (DOCS.parent / "schemas" / "examples").glob("import-*")
    }
    shown = [
        ImportMap.model_validate(yaml.safe_load(block.partition("'END'\n")[2].partition("\nEND\n")[0]))
        for kind, block in blocks(TEXT)
        if kind == "sh"
    ]
    for name, of_page in zip(("import-emmett", "import-eventsourcing"), shown[1:], strict=True):
        assert of_page.model_copy(update={"source": shipped[name].source}) == shipped[name]
