"""Another event table, read in its own order; and how far an import of it is: a row of ours, moved in the transaction that stores the events.

The source's session is read-only. All names that a map gives are quoted, all its values are parameters.
"""

# ruff: noqa: S608 (names are quoted here, values are parameters)

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import asyncpg

from sidecar.core.errors import ConfigurationError, Conflict
from sidecar.postgres.connection import Connection, connect
from sidecar.postgres.errors import mapped

TEXTS: Final = ("tenant", "stream", "type", "id", "schema_version", "subject", "stream_class")
"""What is read as text, whatever the column's type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """Where something stands in a row: in a column, or what `match` (a regular expression of Postgres, its first group) finds in one; or `const`."""

    column: str | None = None
    match: str | None = None
    const: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What to read of it. `values` by our names: stream, position, type, data, tenant, and what else there is. `order`: columns, together unique."""

    name: str
    values: Mapping[str, Value]
    order: Sequence[str]
    where: Mapping[str, Any]


class Source:
    """The table, open for reading. Raises ConfigurationError for a map that does not fit it, StoreUnavailable."""

    def __init__(self, connection: Connection, table: Table, types: Mapping[str, str]) -> None:
        self._connection, self._table, self._types = connection, table, types

    @property
    def data_is_json(self) -> bool:
        return self._types[self._table.values["data"].column or ""] in ("json", "jsonb")

    async def ambiguous(self) -> int:
        """Rows that the order does not tell apart, or has no place for: they could be passed over."""
        columns, (where, given) = ", ".join(map(_quoted, self._table.order)), self._where([])
        nulls = " OR ".join(f"{_quoted(name)} IS NULL" for name in self._table.order)
        sql = f"""SELECT coalesce(sum(n) FILTER (WHERE n > 1 OR misplaced), 0)::bigint FROM
                  (SELECT count(*) AS n, bool_or({nulls}) AS misplaced FROM {self._name} WHERE {where} GROUP BY {columns}) x"""
        return int(await self._value(sql, given))

    async def count(self) -> int:
        where, given = self._where([])
        return int(await self._value(f"SELECT count(*) FROM {self._name} WHERE {where}", given))

    async def next(self, after: Sequence[str] | None, limit: int) -> list[Any]:
        """The rows behind that place, in order; `place` is a row's own."""
        selected, given = self._selected()
        where, given = self._where(given)
        if after is not None:
            given = [*given, *after]
            first = len(given) - len(after) + 1
            behind = ", ".join(f"${first + n}::text::{self._types[name]}" for n, name in enumerate(self._table.order))
            where += f" AND ({', '.join(map(_quoted, self._table.order))}) > ({behind})"
        return await self._fetch(f"SELECT {selected} FROM {self._name} WHERE {where} ORDER BY {self._ordered} LIMIT {int(limit)}", given)

    async def sample(self, size: int) -> list[Any]:
        """Rows at random, each with `rank`: which of its stream's rows it is, from 1."""
        rows, given = self._with_order()
        ranked = f"SELECT *, row_number() OVER (PARTITION BY tenant, stream ORDER BY {self._aliases}) AS rank FROM ({rows}) y"
        return await self._fetch(f"SELECT * FROM ({ranked}) x ORDER BY random() LIMIT {int(size)}", given)

    async def streams(self) -> AsyncIterator[Any]:
        """Each stream: tenant, stream, type and class of its first event, how many events."""
        rows, given = self._with_order()
        sql = f"""SELECT DISTINCT ON (tenant, stream) tenant, stream, type, stream_class, count(*) OVER (PARTITION BY tenant, stream) AS events
                  FROM ({rows}) x ORDER BY tenant, stream, {self._aliases}"""
        with mapped(), _fitting(self._table.name):
            async with self._connection.transaction():
                async for row in self._connection.cursor(sql, *given, prefetch=1000):
                    yield row

    def _with_order(self) -> tuple[str, list[Any]]:
        selected, given = self._selected()
        where, given = self._where(given)
        order = ", ".join(f"{_quoted(name)} AS order_{n}" for n, name in enumerate(self._table.order))
        return f"SELECT {selected}, {order} FROM {self._name} WHERE {where}", given

    @property
    def _aliases(self) -> str:
        return ", ".join(f"order_{n}" for n, _ in enumerate(self._table.order))

    @property
    def _name(self) -> str:
        return _name(self._table.name)

    @property
    def _ordered(self) -> str:
        return ", ".join(map(_quoted, self._table.order))

    def _selected(self) -> tuple[str, list[Any]]:
        given: list[Any] = []
        parts = []
        for name in (*TEXTS, "position", "data", "metadata", "occurred_at"):
            parts.append(f"{self._expression(name, self._table.values.get(name), given)} AS {name}")
        place = ", ".join(f"{_quoted(name)}::text" for name in self._table.order)
        return f"{', '.join(parts)}, ARRAY[{place}] AS place", given

    def _expression(self, name: str, value: Value | None, given: list[Any]) -> str:
        if value is None:
            return "NULL::text"
        if value.column is None:
            given.append(value.const)
            return f"${len(given)}::text"
        column, kind = _quoted(value.column), self._types[value.column]
        if value.match is not None:
            given.append(value.match)
            return f"substring({column}::text FROM ${len(given)}::text)"
        if name == "position":
            return f"{column}::bigint"
        return f"{column}::text" if name in TEXTS or kind in ("json", "jsonb") else column

    def _where(self, given: Sequence[Any]) -> tuple[str, list[Any]]:
        out, parts = list(given), ["true"]
        for name, wanted in self._table.where.items():
            if wanted is None:
                parts.append(f"{_quoted(name)} IS NULL")
            else:
                out.append(wanted)
                parts.append(f"{_quoted(name)} = {f'ANY (${len(out)})' if isinstance(wanted, list) else f'${len(out)}'}")
        return " AND ".join(parts), out

    async def _fetch(self, sql: str, given: Sequence[Any]) -> list[Any]:
        with mapped(), _fitting(self._table.name):
            return await self._connection.fetch(sql, *given)

    async def _value(self, sql: str, given: Sequence[Any]) -> Any:
        return (await self._fetch(sql, given))[0][0]


@asynccontextmanager
async def open_source(dsn: str, table: Table) -> AsyncIterator[Source]:
    """For the length of a block. Nothing can be changed through it."""
    try:
        connection = await connect(dsn, application_name="sidecar import")
    except ValueError:  # it quotes what it cannot read, and that may be a part of the password
        mend = "postgresql://user:password@host:port/database; what is no letter or digit in a password is %-encoded"
        raise ConfigurationError("the dsn cannot be read", where="source.dsn", mend=mend) from None
    try:
        with mapped():
            await connection.execute("SET default_transaction_read_only = on")
            rows = await connection.fetch(
                """SELECT attname, format_type(atttypid, atttypmod) AS kind FROM pg_attribute
                   WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped ORDER BY attnum""",
                _name(table.name),
            )
        types = {row["attname"]: row["kind"] for row in rows}
        if not types:
            raise ConfigurationError("there is no such table, or this role may not see it", where=f"source.table: {table.name}", mend="schema.table")
        for name in (*table.order, *table.where, *(value.column for value in table.values.values() if value.column is not None)):
            if name not in types:
                raise ConfigurationError(f"the table has no column {name}", where=table.name, mend=f"it has {', '.join(types)}")
        yield Source(connection, table, types)
    finally:
        await connection.close()


@contextmanager
def _fitting(table: str) -> Iterator[None]:
    """What the map asks of the table and the table cannot do: a wrong type, an expression that is none. No values are quoted."""
    try:
        yield
    except asyncpg.InsufficientPrivilegeError:
        raise
    except (asyncpg.DataError, asyncpg.SyntaxOrAccessError) as error:
        what = f"the map does not fit the table ({type(error).__name__})"
        raise ConfigurationError(what, where=table, mend="compare its columns' types with the map") from None


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _name(table: str) -> str:
    return ".".join(map(_quoted, table.split(".")))


# ── how far it is ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Behind the row at `after` (None: before the first) everything is answered: stored, or refused by decision."""

    after: Sequence[str] | None
    imported: int
    refused: int


async def begin(connection: Connection, name: str, table: Table) -> Checkpoint:
    """Where the import of that name stands. Raises ConfigurationError where it was begun from another table or in another order."""
    with mapped():
        await connection.execute(
            "INSERT INTO imports (name, source_table, ordered_by) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING", name, table.name, list(table.order)
        )
        row = await connection.fetchrow("SELECT * FROM imports WHERE name = $1", name)
    found: Any = row
    if (found["source_table"], found["ordered_by"]) != (table.name, list(table.order)):
        raise ConfigurationError(
            f"an import {name} was begun from {found['source_table']} in the order of {', '.join(found['ordered_by'])}",
            where="name", mend="another import needs another name",
        )  # fmt: skip
    return Checkpoint(after=found["after"], imported=found["imported"], refused=found["refused"])


async def claim(connection: Connection, name: str, at: Checkpoint) -> None:
    """The checkpoint's row, locked until the end of the transaction. Raises Conflict: another process is at this import."""
    with mapped():
        after = await connection.fetchval("SELECT after FROM imports WHERE name = $1 FOR UPDATE", name)
    if after != at.after:
        raise Conflict(f"another process is at the import {name}")


async def advance(connection: Connection, name: str, now: Checkpoint) -> None:
    """In the transaction that claimed it and stored the rows up to there."""
    with mapped():
        await connection.execute(
            "UPDATE imports SET after = $2, imported = $3, refused = $4, updated_at = clock_timestamp(), verified_at = NULL WHERE name = $1",
            name, now.after, now.imported, now.refused,
        )  # fmt: skip


async def verified(connection: Connection, name: str) -> None:
    """Counts and contents were compared."""
    with mapped():
        await connection.execute("UPDATE imports SET verified_at = clock_timestamp() WHERE name = $1", name)


async def counts(connection: Connection, streams: Sequence[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """How many events we have of each stream of (tenant, stream)."""
    with mapped():
        rows = await connection.fetch(
            """SELECT x.t, x.s, (SELECT count(*) FROM messages m WHERE m.tenant_id = x.t AND m.stream_id = x.s) AS n
               FROM unnest($1::text[], $2::text[]) x(t, s)""",
            [t for t, _ in streams], [s for _, s in streams],
        )  # fmt: skip
    return {(row["t"], row["s"]): row["n"] for row in rows}
