"""Of a class of very many keys the database tells how many and which, as digests: no row of each comes to the control plane."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from sidecar.core.keys import NAMED_AT_MOST, Keys
from sidecar.core.model import Scope, ScopeKind
from sidecar.postgres import quarantine, scopes, shreds
from sidecar.postgres.connection import Connection
from sidecar.testing import control_plane as kit

CLASS = Scope(tenant="acme", kind=ScopeKind.CLASS, id="C")
IN_AN_HOUR = datetime.now(UTC) + timedelta(hours=1)


class Rows:
    """A connection that counts what comes back: a row of a thousand names is one, a thousand rows of a name are a thousand."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self.count = connection, 0

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._connection, name)
        if name not in ("fetch", "fetchrow"):
            return call

        async def counted(*arguments: Any) -> Any:
            found = await call(*arguments)
            self.count += len(found) if name == "fetch" else 1
            return found

        return counted


async def told_one_by_one(connection: Connection) -> Keys:
    rows = await connection.fetch("SELECT key_id, key_version, sha256(commitment) AS fingerprint FROM encryption_keys")
    return Keys.of([f"{row['key_id']}/{row['key_version']}" for row in rows], [row["fingerprint"] for row in rows])


@pytest.mark.parametrize("many", [0, 3, NAMED_AT_MOST, NAMED_AT_MOST + 1])
async def test_the_database_tells_of_keys_what_one_would_tell_who_had_them_all(connection: Connection, many: int) -> None:
    await kit.seed(connection, "acme", {f"s{n}": "C" for n in range(many)})
    every, command_id, rows = await told_one_by_one(connection), uuid4(), Rows(connection)
    taken = await shreds.take_keys(rows, CLASS, command_id, None)  # type: ignore[arg-type]
    assert taken == every
    assert rows.count == 1
    assert len(taken.in_audit().get("keys", ())) == (many if many <= NAMED_AT_MOST else 0)
    found = await connection.fetchval("SELECT fingerprints FROM erased_scopes WHERE command_id = $1", command_id)
    assert found == sorted(found)
    assert len(found) == many
    assert await connection.fetchval("SELECT count(*) FROM encryption_keys WHERE key_material IS NOT NULL OR NOT is_destroyed") == 0


async def test_control_a_row_of_each_key_is_seen(connection: Connection) -> None:
    await kit.seed(connection, "acme", {f"s{n}": "C" for n in range(50)})
    rows = Rows(connection)
    await told_one_by_one(rows)  # type: ignore[arg-type]
    assert rows.count == 50


@pytest.mark.parametrize("ends", ["restored", "destroyed"])
async def test_so_it_does_at_the_end_of_a_grace(connection: Connection, ends: str) -> None:
    await kit.seed(connection, "acme", {f"s{n}": "C" for n in range(NAMED_AT_MOST + 1)})
    every, command_id, rows = await told_one_by_one(connection), uuid4(), Rows(connection)
    assert await shreds.take_keys(connection, CLASS, command_id, IN_AN_HOUR) == every
    act = quarantine.restore(rows, CLASS) if ends == "restored" else quarantine.destroy(rows, command_id)  # type: ignore[arg-type]
    assert await act == every
    assert rows.count <= 2
    assert await scopes.count_deks(connection, CLASS) == every.count
    material = await connection.fetchval("SELECT count(key_material) FROM encryption_keys")
    assert material == (every.count if ends == "restored" else 0)
    assert await connection.fetchval("SELECT count(*) FROM quarantined_keys") == 0
    again = await quarantine.destroy(connection, command_id)
    assert again == Keys.of()


def test_names_are_ordered_as_the_database_orders_them() -> None:
    ids = [UUID(int=n << 120) for n in (3, 200, 17)]
    names = [f"{key_id}/{version}" for key_id in ids for version in (10, 9)]
    assert Keys.of(names).in_audit() == {"count": 6, "keys": sorted(names)}
