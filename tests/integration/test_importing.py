"""Promise: events of another table come over whole, once and in order, sealed as policy says; killed anywhere and run again; the table unchanged."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
import yaml

from sidecar import Erased, Event, Library, NewEvent, PolicySpec
from sidecar import importing as module
from sidecar.core.errors import ConfigurationError, Conflict, MalformedRecord, SidecarError
from sidecar.import_map import ImportMap, load_map
from sidecar.importing import Import, Verified
from sidecar.postgres import audit, imports
from sidecar.postgres.connection import transaction
from sidecar.postgres.imports import open_source
from sidecar.settings import Settings
from sidecar.steps import SystemClock
from sidecar.testing import control_plane as kit

EXAMPLES = Path(__file__).parents[2] / "schemas" / "examples"

EMMETT = """
CREATE SCHEMA shop;
CREATE SEQUENCE shop.global_position;
CREATE TABLE shop.messages (
  stream_position BIGINT NOT NULL, global_position BIGINT DEFAULT nextval('shop.global_position'), transaction_id XID8 NOT NULL,
  created TIMESTAMPTZ NOT NULL DEFAULT now(), is_archived BOOLEAN NOT NULL DEFAULT FALSE, message_kind VARCHAR(1) NOT NULL DEFAULT 'E',
  stream_id TEXT NOT NULL, partition TEXT NOT NULL DEFAULT 'emt:default', message_schema_version TEXT NOT NULL, message_id TEXT NOT NULL,
  message_type TEXT NOT NULL, message_data JSONB NOT NULL, message_metadata JSONB NOT NULL,
  PRIMARY KEY (stream_id, stream_position, partition, is_archived)
) PARTITION BY LIST (partition);
CREATE TABLE shop.messages_default PARTITION OF shop.messages FOR VALUES IN ('emt:default') PARTITION BY LIST (is_archived);
CREATE TABLE shop.messages_default_active PARTITION OF shop.messages_default FOR VALUES IN (FALSE);
CREATE TABLE shop.messages_default_archived PARTITION OF shop.messages_default FOR VALUES IN (TRUE);
CREATE TABLE shop.messages_other PARTITION OF shop.messages FOR VALUES IN ('emt:other');
"""
EVENTSOURCING = """
CREATE TABLE stored_events (originator_id UUID NOT NULL, originator_version BIGINT NOT NULL, topic TEXT, state BYTEA, notification_id SERIAL,
  PRIMARY KEY (originator_id, originator_version));
CREATE UNIQUE INDEX stored_events_notification_id_idx ON stored_events (notification_id ASC);
"""


async def execute(dsn: str, *statements: str) -> list[Any]:
    connection = await asyncpg.connect(dsn)
    try:
        for statement in statements:
            rows = await connection.fetch(statement) if statement.startswith("SELECT") else await connection.execute(statement)
        return list(rows)
    finally:
        await connection.close()


async def emmett_rows(dsn: str, events: Iterable[tuple[str, int, Any]], *, archived: bool = False, partition: str = "emt:default") -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.executemany(
            """INSERT INTO shop.messages (stream_id, stream_position, message_data, is_archived, partition, transaction_id, message_schema_version,
                 message_id, message_type, message_metadata) VALUES ($1, $2, $3, $4, $5, pg_current_xact_id(), '1', $6, 'Added', '{"by": "jane"}')""",
            [(stream, position, json.dumps(data), archived, partition, str(uuid4())) for stream, position, data in events],
        )
    finally:
        await connection.close()


def emmett(**changes: Any) -> ImportMap:
    document = yaml.safe_load((EXAMPLES / "import-emmett.yaml").read_text())
    document["source"]["table"] = "shop.messages"
    return ImportMap.model_validate(document | {"rows": 3} | changes)


@asynccontextmanager
async def ready(library: Library, database: str, plan: ImportMap, kind: type[Import] = Import) -> AsyncIterator[Import]:
    async with open_source(plan.dsn(database), plan.table()) as source:
        yield kind(plan, source, library.store, library.keys, library.classify, library.plain.pool, SystemClock(), "a test")


async def carried(library: Library, database: str, plan: ImportMap, kind: type[Import] = Import) -> Verified:
    async with ready(library, database, plan, kind) as work:
        async for _ in work.run():
            pass
        return await work.verify()


async def ours(library: Library, tenant: str = "acme") -> list[Event]:
    """Everything that the library reads of a tenant, in the store's order. (`read_all` waits for transactions of other tests on the same server.)"""
    pool = library.plain.pool
    order = await pool.fetch("SELECT stream_id, stream_position FROM messages WHERE tenant_id = $1 ORDER BY transaction_id, global_position", tenant)
    streams = {row["stream_id"] for row in order}
    found = {(held.stream, held.position): held for name in streams for held in (await library.store.read_stream(name, tenant=tenant)).events}
    return [held for row in order if isinstance(held := found[row["stream_id"], row["stream_position"]], Event)]


async def faults(library: Library, database: str) -> list[str]:
    """The checker: the table and the store, row by row: each event once, in its stream's order, under gap-free positions, to the byte."""
    rows = await execute(
        database,
        "SELECT stream_id, stream_position, message_id, message_data::text AS data FROM shop.messages WHERE NOT is_archived ORDER BY stream_id, stream_position",
    )
    wanted = [(row["stream_id"], row["stream_position"], row["message_id"], row["data"].encode()) for row in rows]
    events = sorted(await ours(library), key=lambda event: (event.stream, event.position))
    found = [(event.stream, event.metadata["imported"]["position"], event.message_id, event.value) for event in events]
    out = [] if found == wanted else [f"{len(wanted)} rows, {len(found)} events, or not the same ones"]
    by_stream: dict[str, list[int]] = {}
    for event in events:
        by_stream.setdefault(event.stream, []).append(event.position)
    return out + [f"positions {positions}" for positions in by_stream.values() if positions != list(range(1, len(positions) + 1))]


@pytest.fixture
async def shop(database: str, library: Library) -> str:
    """An emmett table beside ours in the same database: three streams, interleaved; one of a class that stays plain."""
    await execute(database, EMMETT)
    await emmett_rows(
        database, [(stream, n, {"email": "jane@example.org", "n": n}) for n in range(1, 5) for stream in ("user-1", "cart-1", "user-2")]
    )
    return database


async def test_a_table_like_emmetts_comes_over_whole_sealed_by_policy_and_stays_as_it_was(shop: str, library: Library) -> None:
    await emmett_rows(shop, [("user-1", n, {"archived": n}) for n in (1, 2)], archived=True)
    await emmett_rows(shop, [("user-1", 1, {"of": "another partition"})], partition="emt:other")
    await emmett_rows(shop, [("user-3", 7, {"big": 12345678901234567890123, "exact": "1.10"}), ("user-3", 9, None)])
    before = await execute(shop, "SELECT * FROM shop.messages ORDER BY global_position")
    async with ready(library, shop, emmett()) as work:
        shown = await work.preview()
        assert [(row["class"], row["streams"], row["events"], row["outcome"]) for row in shown] == [
            ("CartData", 1, 4, "plain"), ("unclassified", 3, 10, "encrypted"),
        ]  # fmt: skip
        assert await ours(library) == []
    verified = await carried(library, shop, emmett())
    assert (verified.faults, verified.rows, verified.imported, verified.streams, verified.sampled) == ([], 14, 14, 4, 14)
    events = await ours(library)
    taken = [row for row in before if not row["is_archived"] and row["partition"] == "emt:default"]
    assert [event.message_id for event in events] == [row["message_id"] for row in taken], "the order among streams is the table's"
    assert [event.data for event in events if event.stream == "cart-1"] == [{"email": "jane@example.org", "n": n} for n in range(1, 5)]
    assert [(e.position, e.metadata["imported"], e.metadata["by"]) for e in events if e.stream == "user-3"] == [
        (1, {"from": "shop", "position": 7}, "jane"), (2, {"from": "shop", "position": 9}, "jane"),
    ]  # fmt: skip
    assert [event.occurred_at for event in events] == [row["created"] for row in taken]
    plain = await execute(shop, "SELECT DISTINCT stream_id FROM messages WHERE data IS NOT NULL")
    assert [row["stream_id"] for row in plain] == ["cart-1"], "what policy encrypts is nowhere in clear"
    assert await execute(shop, "SELECT * FROM shop.messages ORDER BY global_position") == before


async def test_what_came_into_the_table_since_is_taken_over_by_the_next_run(shop: str, library: Library) -> None:
    assert (await carried(library, shop, emmett())).imported == 12
    await emmett_rows(shop, [("user-1", 5, {"n": 5}), ("user-9", 1, {"n": 1})])
    async with ready(library, shop, emmett()) as work:
        assert any("the table has 14 rows, and 12 were taken over" in fault for fault in (await work.verify()).faults)
    verified = await carried(library, shop, emmett())
    assert (verified.faults, verified.imported) == ([], 14)
    assert await faults(library, shop) == []


async def test_a_table_like_eventsourcings_in_another_database_comes_over(make_database: Callable[[], str], library: Library, database: str) -> None:
    other = make_database()
    await execute(other, EVENTSOURCING)
    dogs = [UUID(int=n) for n in (1, 2)]
    connection = await asyncpg.connect(other)
    for n in (0, 1, 4):  # as old versions counted; and with a gap
        for dog in dogs:
            await connection.execute("INSERT INTO stored_events VALUES ($1, $2, 'dogs:Dog.Named', $3)", dog, n, b'{"name":"Fido","n":%d}' % n)
    await connection.execute("INSERT INTO stored_events VALUES ($1, 5, 'dogs:Dog.Gone', NULL)", dogs[0])
    await connection.close()
    document = yaml.safe_load((EXAMPLES / "import-eventsourcing.yaml").read_text())
    document["source"]["dsn"] = other
    document["events"]["tenant"] = {"column": "originator_id", "match": "(....)$"}  # a tenant each
    verified = await carried(library, database, ImportMap.model_validate(document))
    assert (verified.faults, verified.imported, verified.streams) == ([], 7, 2)
    first, second = await ours(library, "0001"), await ours(library, "0002")
    assert [(e.stream, e.position, e.metadata["imported"]["position"]) for e in second] == [(str(dogs[1]), n, p) for n, p in ((1, 0), (2, 1), (3, 4))]
    assert [event.data for event in first] == [{"name": "Fido", "n": 0}, {"name": "Fido", "n": 1}, {"name": "Fido", "n": 4}, None]
    assert first[0].value == b'{"name":"Fido","n":0}'
    del document["events"]["data"]["as"]
    again = ImportMap.model_validate(document | {"name": "as-bytes"})
    again = again.model_copy(update={"events": again.events.model_copy(update={"tenant": emmett().events.tenant})})
    assert (await carried(library, database, again)).faults == []
    assert (await ours(library))[0].data == b'{"name":"Fido","n":0}'


async def test_events_come_under_a_policy_of_fields_and_of_persons(shop: str, library: Library) -> None:
    for policy in (
        {"class": "unclassified", "key_scope": "subject", "subject": "json:/email"},
        {"class": "CartData", "tenant": "acme", "fields": ["/email"]},
    ):
        await library.policies.create_policy(PolicySpec.model_validate(policy), actor="a test", reason="a test")
    await emmett_rows(shop, [("user-1", 5, {"email": "joe@example.org"}), ("user-2", 5, {"email": "jane@example.org"})])
    await execute(
        shop,
        f"INSERT INTO erased_scopes (tenant_id, scope_kind, scope_id, command_id, fingerprints) VALUES ('acme', 'subject', 'joe@example.org', '{uuid4()}', '{{}}')",
    )
    verified = await carried(library, shop, emmett(rows=50, order=["stream_id", "stream_position"]))
    assert (verified.faults, verified.imported, verified.refused) == ([], 13, 1)
    keys = await execute(shop, "SELECT scope_kind, scope_id FROM encryption_keys ORDER BY 1, 2")
    assert [tuple(row) for row in keys] == [("stream", "cart-1"), ("subject", "jane@example.org")]
    clear = [row["data"] for row in await execute(shop, "SELECT data FROM messages WHERE data IS NOT NULL")]
    assert [b"ks1." in data and b"jane" not in data for data in clear] == [True] * 4
    assert [event.data for event in await ours(library) if event.stream == "cart-1"] == [{"email": "jane@example.org", "n": n} for n in range(1, 5)]


# ── killed anywhere ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Killed(BaseException):
    """As SIGKILL: nothing after it runs, and Postgres undoes what was not committed."""


class Forgetful(Import):
    """Broken: the checkpoint has a transaction of its own."""

    async def _claim(self, session: Any, at: Any) -> None:
        pass

    async def _advance(self, session: Any, before: Any, now: Any, refused: int) -> None:
        async with transaction(self._pool) as connection:
            await imports.advance(connection, self._map.name, now)


def dying_at(point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[str] = []

    def failpoint(name: str) -> None:
        passed.append(name)
        if passed.count(point) == 2:  # in the second rows
            monkeypatch.undo()
            raise Killed

    monkeypatch.setattr(module, "failpoint", failpoint)


POINTS = ("import:appended", "import:advanced", "import:committed")


@pytest.mark.parametrize("point", POINTS)
async def test_an_import_that_is_killed_goes_on_with_nothing_lost_and_nothing_twice(
    shop: str, library: Library, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    dying_at(point, monkeypatch)
    with pytest.raises(Killed):
        await carried(library, shop, emmett())
    assert await faults(library, shop) != [], "it is not whole yet"
    assert (await carried(library, shop, emmett())).faults == []
    assert await faults(library, shop) == []


async def test_control_a_checkpoint_of_its_own_loses_rows_and_both_checkers_say_so(
    shop: str, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying_at("import:advanced", monkeypatch)
    with pytest.raises(Killed):
        await carried(library, shop, emmett(), Forgetful)
    verified = await carried(library, shop, emmett(), Forgetful)
    assert any("3 events of the table are not in the store" in fault for fault in verified.faults)
    assert await faults(library, shop) != []


async def test_two_processes_at_one_import_do_not_both_go_on(shop: str, library: Library) -> None:
    async with ready(library, shop, emmett()) as first, ready(library, shop, emmett()) as second:
        one, two = first.run(), second.run()
        await anext(one)
        await anext(two)
        await anext(one)
        with pytest.raises(Conflict):
            await anext(two)
    assert (await carried(library, shop, emmett())).faults == []
    assert await faults(library, shop) == []


async def test_the_command_killed_by_sigkill_goes_on_and_shows_no_password(shop: str, library: Library, settings: Settings, tmp_path: Path) -> None:
    document = emmett().model_dump(by_alias=True, mode="json") | {"rows": 3}
    document["source"] = {"dsn": shop + "?password=the-password", "table": "shop.messages"}
    (tmp_path / "map.yaml").write_text(json.dumps(document))
    command = [
        sys.executable,
        "-m",
        "sidecar",
        "--config",
        str(tmp_path / "sidecar.yaml"),
        "-o",
        "json",
        "import",
        "--map",
        str(tmp_path / "map.yaml"),
    ]

    def start(**environment: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(command, capture_output=True, timeout=120, env=os.environ | environment, check=False)

    dead = await asyncio.to_thread(start, SIDECAR_TEST_FAILPOINT="import:advanced")
    assert dead.returncode == -9, dead.stderr.decode()
    done = await asyncio.to_thread(start)
    assert done.returncode == 0, done.stderr.decode()
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["state"] for line in lines] == ["importing"] * 5 + ["verified"]
    assert (lines[0]["of"], lines[-1]["imported"], lines[-1]["faults"]) == (12, 12, [])
    assert await faults(library, shop) == []
    for said in (dead, done):
        assert b"the-password" not in said.stdout + said.stderr


# ── what is refused, and what is not what it should be ──────────────────────────────────────────────────────────────────


async def test_rows_of_what_is_shredded_are_refused_counted_and_audited(shop: str, library: Library) -> None:
    await library.store.append_to_stream("user-0", [NewEvent(type="T")], tenant="acme")
    await execute(
        shop,
        f"INSERT INTO erased_scopes (tenant_id, scope_kind, scope_id, command_id, fingerprints) VALUES ('acme', 'stream', 'user-2', '{uuid4()}', '{{}}')",
    )
    verified = await carried(library, shop, emmett())
    assert (verified.faults, verified.imported, verified.refused) == ([], 8, 4)
    assert {event.stream for event in await ours(library)} == {"user-0", "user-1", "cart-1"}
    async with transaction(library.plain.pool) as connection:
        rows = [row for row in await audit.read(connection) if row.writer == "import"]
    assert sum(row.details["rows"] for row in rows if row.action == "events.import_refused") == 4
    assert (rows[-1].action, rows[-1].details["state"], rows[-1].details["refused"]) == ("events.import", "verified", 4)
    assert b"user-2" not in json.dumps([row.details for row in rows]).encode()


async def test_an_event_that_is_not_what_the_table_has_is_found_at_the_end(shop: str, library: Library) -> None:
    """The control of the read-back: the same look, at a table that says something else."""
    assert (await carried(library, shop, emmett())).faults == []
    await execute(shop, """UPDATE shop.messages SET message_data = '{"n": 0}' WHERE stream_id = 'cart-1' AND stream_position = 2""")
    async with ready(library, shop, emmett()) as work:
        assert (await work.verify()).faults == ["a sampled event is not what the table has"]
    await execute(shop, "DELETE FROM messages WHERE stream_id = 'user-1' AND stream_position = 4")
    async with ready(library, shop, emmett()) as work:
        found = (await work.verify()).faults
    assert any("1 events of the table are not in the store" in fault for fault in found)
    assert "a sampled event is not in the store" in found


async def test_an_event_that_was_shredded_since_is_no_fault(shop: str, library: Library) -> None:
    assert (await carried(library, shop, emmett())).faults == []
    await execute(shop, "UPDATE encryption_keys SET key_material = NULL, is_destroyed = true, is_active = false, destroyed_at = now() WHERE scope_id = 'user-1'",
                  "UPDATE tenants SET epoch = epoch + 1")  # fmt: skip
    async with ready(library, shop, emmett()) as work:
        verified = await work.verify()
    assert (verified.faults, verified.erased) == ([], 4)
    assert {type(held) for held in (await library.store.read_stream("user-1", tenant="acme")).events} == {Erased}


async def test_a_stream_that_has_events_of_its_own_is_not_touched(shop: str, library: Library) -> None:
    await library.store.append_to_stream("user-2", [NewEvent(type="T", data="mine")], tenant="acme")
    with pytest.raises(Conflict, match=r"the stream of row 3 has events here that this import did not bring"):
        await carried(library, shop, emmett())
    assert [event.data for event in await ours(library)] == ["mine"]


@pytest.mark.parametrize(
    ("statement", "changes", "error", "says"),
    [
        ("SELECT", {"order": ["stream_position"]}, ConfigurationError, "the order does not tell 12 rows apart"),
        ("SELECT", {"order": ["nonsense"]}, ConfigurationError, "the table has no column nonsense"),
        ("SELECT", {"where": {"is_archived": "perhaps"}}, ConfigurationError, "the map does not fit the table"),
        ("SELECT", {"source": {"table": "shop.nonsense"}}, ConfigurationError, "there is no such table"),
        ("UPDATE shop.messages SET global_position = NULL WHERE global_position = 5", {}, ConfigurationError, "does not tell 1 rows apart"),
        ("UPDATE shop.messages SET stream_position = 20 WHERE global_position = 4", {}, MalformedRecord, "row 7 of the table.*not behind 20"),
        ("UPDATE shop.messages SET message_schema_version = 'jane' WHERE global_position = 5", {}, MalformedRecord, "row 5 of the table"),
        ("UPDATE shop.messages SET message_metadata = '[\"jane\"]' WHERE global_position = 5", {}, MalformedRecord, "row 5 of the table"),
        ("UPDATE shop.messages SET stream_id = E'jane\\n' WHERE global_position = 5", {}, MalformedRecord, "row 5 of the table"),
    ],
)  # fmt: skip
async def test_what_cannot_be_taken_over_stops_it_by_number_and_without_the_row(
    shop: str, library: Library, statement: str, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    await execute(shop, statement)
    with pytest.raises(error, match=says) as caught:
        await carried(library, shop, emmett(**changes))
    assert "jane" not in str(caught.value)


async def test_the_name_of_an_import_belongs_to_one_table_and_one_order(shop: str, library: Library) -> None:
    await carried(library, shop, emmett())
    with pytest.raises(ConfigurationError, match="was begun from"):
        await carried(library, shop, emmett(order=["stream_id", "stream_position", "partition", "is_archived"]))


async def test_a_shred_in_the_middle_of_an_import_wins(shop: str, library: Library, settings: Settings, tmp_path: Path) -> None:
    assert settings.control.allow_unsigned
    with kit.control(tmp_path / "sidecar.yaml"):
        async with ready(library, shop, emmett()) as work:
            async for at in work.run():
                if at.imported == 6:
                    receipt = await library.shredding.forget_tenant_data("acme", reason="r")
                    assert receipt["status"] == "inaccessible"
            verified = await work.verify()
    assert (verified.faults, verified.imported, verified.refused) == ([], 6, 6)
    assert [event.stream for event in await ours(library)] == ["cart-1", "cart-1"], "plain events are not made unreadable by keys"


@pytest.mark.parametrize("dsn", ["postgresql://me:the/password@host:5432/x", "postgresql://me@host:the-password/x", "the-password"])
async def test_a_dsn_that_is_none_is_not_quoted(dsn: str) -> None:
    with pytest.raises(SidecarError) as caught:
        async with open_source(dsn, emmett().table()):
            pass
    assert "password" not in str(caught.value).partition("mend:")[0]


async def test_the_source_cannot_be_changed_through_its_session(shop: str) -> None:
    async with open_source(shop, emmett().table()) as source:
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await source._connection.execute("DELETE FROM shop.messages")


def test_a_map_is_read_strictly_and_its_password_never_shown(tmp_path: Path) -> None:
    for example in sorted(EXAMPLES.glob("import-*.yaml")):
        assert load_map(example).table().order
    text = (EXAMPLES / "import-emmett.yaml").read_text().replace("table: messages", "table: messages\n  dsn: postgresql://me:the-password@db/shop")
    for broken in (text.replace("order:", "ordre:"), text.replace("stream: stream_id", "stream: {}"), text + "  - :\n"):
        (tmp_path / "map.yaml").write_text(broken)
        with pytest.raises(ConfigurationError) as caught:
            load_map(tmp_path / "map.yaml")
        assert "the-password" not in str(caught.value)
    (tmp_path / "map.yaml").write_text(text)
    assert "the-password" not in repr(load_map(tmp_path / "map.yaml"))
    assert load_map(tmp_path / "map.yaml").dsn("ours").endswith("the-password@db/shop")


async def test_columns_of_another_kind_are_refused_and_not_taken_for_bytes(library: Library, database: str) -> None:
    """`bytes(3)` would be three NULs, here and in the check at the end."""
    await execute(database, "CREATE TABLE odd (s TEXT, n BIGINT, d DATE, t TEXT)", "INSERT INTO odd VALUES ('a', 3, '2024-02-29', '{}')")
    base = {"tenant": {"const": "acme"}, "stream": "s", "position": "n", "type": {"const": "T"}}
    for number, odd in enumerate(({"data": "n"}, {"data": "t", "occurred_at": "d"}, {"data": "t", "occurred_at": "t"})):
        plan = ImportMap.model_validate({"name": f"odd{number}", "source": {"table": "odd"}, "order": ["n"], "events": base | odd})
        with pytest.raises(MalformedRecord, match="row 1"):
            await carried(library, database, plan)
    assert await library.plain.pool.fetchval("SELECT count(*) FROM messages") == 0
