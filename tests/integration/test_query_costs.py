"""What is asked often, or of large tables, costs the same however much is stored: counted in pages that Postgres touches, not in time."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import orjson
import pytest

from sidecar.cli.keys import _KEYS
from sidecar.core.model import Scope, ScopeKind
from sidecar.core.store import Expected, NewEvent
from sidecar.postgres import (
    checkpoints,
    commands,
    event_store,
    evidence,
    jobs,
    keystore,
    ledger,
    residue,
    rotations,
    scopes,
    shreds,
    unused_keys,
)
from sidecar.postgres.connection import Connection

MANY = 20_000
PAGES = 150
"""A look at a whole table of MANY rows touches more; an index takes a few per row that is asked for."""
NOW = datetime.now(UTC)
ACME = "acme"

# A tenant with MANY streams, each with an event and a live key, every second one erased, some with an old key, one live key old too; a long past of commands.
_FILL = f"""
INSERT INTO tenants (tenant_id) SELECT 'acme' UNION ALL SELECT 't' || n FROM generate_series(1, {MANY}) n;
INSERT INTO streams (tenant_id, stream_id, position, stream_type_class, is_encrypted, encrypted_from_position)
  SELECT 'acme', 's' || n, 1, 'C' || n % 10, true, 1 FROM generate_series(1, {MANY}) n;
INSERT INTO messages (tenant_id, stream_id, stream_position, message_id, message_type, data_encrypted)
  SELECT 'acme', 's' || n, 1, 'm', 'T', decode(repeat('00', 100), 'hex') FROM generate_series(1, {MANY}) n;
INSERT INTO encryption_keys (tenant_id, key_id, key_version, scope_kind, scope_id, generation, kek_version, key_material, commitment, is_active, retired_at)
  SELECT 'acme', ('00000000-0000-0000-0000-' || lpad(n::text, 12, '0'))::uuid, v, 'stream', 's' || n, 1, 1, '\\x00', '\\x00', v = 2,
    CASE WHEN v = 1 AND n % 1000 = 0 THEN now() - interval '1 year' END
  FROM generate_series(1, {MANY}) n, generate_series(1, 2) v WHERE v = 2 OR n % 1000 = 0;
UPDATE encryption_keys SET created_at = now() - interval '1 year' WHERE NOT is_active OR scope_id = 's7';
INSERT INTO stream_key_history (tenant_id, stream_id, key_id, key_version, used_from_position)
  SELECT tenant_id, scope_id, key_id, key_version, 1 FROM encryption_keys WHERE is_active;
INSERT INTO erased_scopes (tenant_id, scope_kind, scope_id, command_id, fingerprints)
  SELECT 'acme', 'stream', 's' || n, gen_random_uuid(), ARRAY[]::bytea[] FROM generate_series(1, {MANY}, 2) n;
INSERT INTO commands (command_id, op, tenant_id, payload, payload_sha256, status, finished_at)
  SELECT gen_random_uuid(), 'shred', 't' || n, '', '', 'complete', now() FROM generate_series(1, {MANY}) n;
INSERT INTO residue (command_id, kind, place, state) SELECT command_id, 'view', 'v', 'done' FROM commands;
INSERT INTO receipts (receipt_id, command_id, status, body, published_at) SELECT gen_random_uuid(), command_id, s, '{{}}', now() FROM commands, unnest(ARRAY['accepted', 'complete']) s;
INSERT INTO certificates (certificate_id, command_id, status, envelope, salt) SELECT gen_random_uuid(), command_id, 'complete', '', '' FROM commands;
INSERT INTO ledger (entry_id, command_id, tenant_ref, envelope, published_at) SELECT gen_random_uuid(), command_id, tenant_ref(tenant_id), '', now() FROM commands;
INSERT INTO erased_refs (ref, tenant_ref, scope_kind, command_id, erased_at) SELECT scope_ref('x', 'stream', tenant_id), tenant_ref(tenant_id), 'stream', command_id, now() FROM commands;
INSERT INTO jobs (command_id, chunk, tenant_id, streams, plain, state, published_at) SELECT command_id, 0, tenant_id, '{{}}', false, 'done', now() FROM commands;
INSERT INTO streams (tenant_id, stream_id, stream_type_class, is_encrypted) VALUES ('acme', 'plain', 'Plain', false);
INSERT INTO consumer_checkpoints (consumer, transaction_id, global_position) SELECT 'c', max(transaction_id::text::bigint)::text::xid8, 100 FROM messages;
ANALYZE;
"""


class Counting:
    """A connection whose statements are explained before they are carried out; `pages`: the dearest of them, `plan`: the last one's."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self.pages = connection, 0
        self.plan: dict[str, Any] = {}

    async def _explained(self, sql: str, *arguments: Any) -> None:
        async with self._connection.transaction():
            [found] = orjson.loads(await self._connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}", *arguments))
        self.plan = found["Plan"]
        self.pages = max(self.pages, found["Plan"]["Shared Hit Blocks"] + found["Plan"]["Shared Read Blocks"])

    def __getattr__(self, name: str) -> Any:
        if name not in ("fetch", "fetchrow", "fetchval"):
            return getattr(self._connection, name)

        async def call(sql: str, *arguments: Any) -> Any:
            await self._explained(sql, *arguments)
            return await getattr(self._connection, name)(sql, *arguments)

        return call


@pytest.fixture
async def connection(connection: Connection) -> Connection:
    """Filled."""
    await connection.execute(_FILL)
    return connection


def stream_of(number: int) -> Scope:
    return Scope(tenant=ACME, kind=ScopeKind.STREAM, id=f"s{number}")


async def ask(c: Any) -> AsyncIterator[tuple[str, Any]]:
    """Name → a query, as the code asks it."""
    somebody, past = uuid4(), NOW - timedelta(days=30)
    new, known = (event_store._arguments(stream, [NewEvent(type="T", data=1)], ACME, None, Expected.ANY, None, False) for stream in ("new", "plain"))
    yield "residue: due", residue.due(c, NOW)
    yield "residue: who searches a topic", residue.searching(c, "v", "another")
    yield "residue: of a command", residue.of_command(c, somebody)
    yield "residue: streams of a view by stream", residue.sealed_streams(c, stream_of(7), "", 5000)
    yield "residue: events of a stream", residue.sealed_events(c, stream_of(7), ("", 0), 5000, NOW)
    yield "residue: from where streams are encrypted", residue.encrypted_from(c, ACME, ["s1", "s2"])
    yield "commands: waiting", commands.tenants_waiting(c)
    yield "commands: next", commands.next_job(c, ACME)
    yield "rotations: due", rotations.due(c, NOW)
    yield "receipts: unpublished", commands.unpublished(c)
    yield "certificates: due", evidence.due(c, datetime.now(UTC))
    yield "certificates: newest receipt", evidence.newest_receipt(c)
    yield "ledger: unpublished", ledger.unpublished(c)
    yield "ledger: knows", ledger.knows(c, somebody)
    yield "jobs: all done", jobs.all_done(c)
    yield "jobs: unpublished", jobs.unpublished(c, past)
    yield "clean-up: candidates", unused_keys.candidates(c, ACME, past, (UUID(int=0), 0), 10)
    yield "shred: who shares a stream's key", shreds.refuse_shared(c, stream_of(7))
    yield "consumer: listen", checkpoints.listen(c, "c")
    yield "consumer: a page", c.fetch(event_store._ALL, "0", 0, None, None, 20)
    yield "consumer: nothing new", c.fetch(event_store._ALL, str(2**40), 0, None, None, 500)
    yield "batch: tenants", c.fetch(keystore._TENANTS, [ACME])
    yield "batch: streams", c.fetch(keystore._STREAMS, [ACME, ACME], ["s1", "another"])
    yield "batch: newest keys", c.fetch(keystore._NEWEST_KEYS, [ACME], ["stream"], ["s8"])
    yield "batch: persons", c.fetch(keystore._SUBJECTS, [ACME], ["subject"], ["jane"])
    yield "batch: keys", c.fetch(keystore._KEYS, [ACME], [UUID(int=7)], [2])
    yield "keys list: a page", c.fetch(_KEYS, ACME, UUID(int=7), 2, 5)
    yield "append: a new stream", c.fetch(event_store._APPEND, *new)
    yield "append: a known stream", c.fetch(event_store._APPEND, *known)


async def dear(connection: Connection) -> dict[str, int]:
    """The queries of which one statement touches more than PAGES, each asked once before: a plan is made from catalogues that are read then."""
    out, counting = {}, Counting(connection)
    for _ in range(2):
        async for name, query in ask(counting):
            counting.pages = 0
            async with connection.transaction():
                await query
            out[name] = counting.pages
    return {name: pages for name, pages in out.items() if pages > PAGES}


async def test_what_is_asked_often_costs_the_same_however_much_is_stored(connection: Connection) -> None:
    assert await dear(connection) == {}


async def test_control_without_its_index_a_query_is_found_dear(connection: Connection) -> None:
    await connection.execute(
        "DROP INDEX residue_pending; DROP INDEX encryption_keys_retired; DROP INDEX messages_global; DROP INDEX receipts_of_shreds;"
        "DROP INDEX encryption_keys_by_age"
    )
    assert {"rotations: due", "residue: due", "clean-up: candidates", "consumer: nothing new", "certificates: due"} <= set(await dear(connection))


# One class of all of MANY streams, with a key of its own, and keys of streams that have no row: of what the library alone sealed.
_LARGE_CLASS = """
UPDATE streams SET stream_type_class = 'Large' WHERE tenant_id = 'acme' AND is_encrypted;
INSERT INTO encryption_keys (tenant_id, key_id, key_version, scope_kind, scope_id, generation, kek_version, commitment, is_active, outside_class) VALUES
  ('acme', gen_random_uuid(), 1, 'class', 'Large', 1, 1, '', true, NULL), ('acme', gen_random_uuid(), 1, 'class', 'Other', 1, 1, '', true, NULL),
  ('acme', gen_random_uuid(), 1, 'stream', 'out', 1, 1, '', false, 'Large'), ('acme', gen_random_uuid(), 2, 'stream', 'out', 1, 1, '', true, NULL),
  ('acme', gen_random_uuid(), 1, 'stream', 'elsewhere', 1, 1, '', true, 'Other'), ('acme', gen_random_uuid(), 3, 'stream', 's1', 1, 1, '', false, 'Other')
"""
LARGE = Scope(tenant=ACME, kind=ScopeKind.CLASS, id="Large")


def handled(plan: dict[str, Any]) -> int:
    """Rows that a plan's nodes handed on, all in all."""
    return round(plan["Actual Rows"] * plan["Actual Loops"]) + sum(handled(below) for below in plan.get("Plans", ()))


async def rows_of(connection: Connection, condition: str | None = None) -> tuple[int, int]:
    """-> how many keys the large class has, and rows handled for each of them, as they are counted or by a condition."""
    counting: Any = Counting(connection)
    by = f"SELECT count(*) FROM encryption_keys k WHERE {condition}"
    found = await (counting.fetchval(by, ACME, LARGE.id) if condition else scopes.count_deks(counting, LARGE))
    return found, handled(counting.plan) // found


@pytest.fixture
async def large_class(connection: Connection) -> Connection:
    await connection.execute(_LARGE_CLASS)
    for table in ("streams", "encryption_keys"):
        await connection.execute(f"VACUUM (FULL, ANALYZE) {table}")
    return connection


async def test_the_keys_of_a_large_class_are_counted_by_a_plain_join(large_class: Connection) -> None:
    found, each = await rows_of(large_class)
    assert found == MANY + MANY // 1000 + 4
    assert each < 5
    by_condition, control = await rows_of(large_class, scopes.keys_of(LARGE))  # as a shred finds them: the same keys, at twice the cost
    assert by_condition == found
    assert control > 5


async def chunk_of_rotation(connection: Connection, after: str) -> int:
    """Pages that the next 20 keys of the large class cost."""
    counting: Any = Counting(connection)
    names, last = await rotations.retire_some(counting, LARGE, NOW + timedelta(hours=1), ["stream", after], 20)
    assert len(names) == 20
    assert last is not None
    return int(counting.pages)


async def test_a_chunk_of_a_rotation_costs_the_same_however_large_its_class_is(large_class: Connection) -> None:
    for after in ("", "s5", "s9"):
        await chunk_of_rotation(large_class, after)  # plans are made from catalogues that are read then
        assert await chunk_of_rotation(large_class, after) < 6 * PAGES
    counting: Any = Counting(large_class)  # control: whether there are more than so many asks about the whole class
    assert await rotations.more_live_than(counting, LARGE, None, 20)
    assert counting.plan["Actual Rows"] == 1
    assert handled(counting.plan) > 2 * MANY
