"""Rows of the blind index, as SQL. In the caller's transaction. A row counts only while the key of its event lives."""

# ruff: noqa: S608 (statements are put together from constants; what comes from outside is a parameter)

from collections.abc import Iterable, Sequence
from typing import Any, Final

from sidecar.core.blind_index import SCOPE_ID
from sidecar.core.model import Scope
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped
from sidecar.postgres.scopes import messages_of

COLUMNS: Final = ("tenant_id", "token", "stream_id", "stream_position")
Row = tuple[str, bytes, str, int]

# Bytes 5 to 20 of an envelope name its key, 21 to 24 the version (docs/FORMAT.md). Of a tenant that is gone, no key lives.
_LIVES: Final = """EXISTS (
  SELECT FROM encryption_keys k JOIN tenants t ON t.tenant_id = k.tenant_id AND t.generation = k.generation AND t.state = 'active'
  WHERE k.tenant_id = m.tenant_id AND k.key_material IS NOT NULL
    AND k.key_id = CASE WHEN length(m.data_encrypted) > 37 THEN encode(substring(m.data_encrypted FROM 6 FOR 16), 'hex')::uuid END
    AND int4send(k.key_version) = substring(m.data_encrypted FROM 22 FOR 4))"""
_GONE: Final = f"""SELECT b.* FROM blind_index b JOIN messages m USING (tenant_id, stream_id, stream_position)
WHERE {{of}} AND NOT {_LIVES}"""


async def insert(connection: Connection, rows: Iterable[Row]) -> None:
    """Rows that are there already stay."""
    with mapped():
        await connection.execute(
            f"""INSERT INTO blind_index ({", ".join(COLUMNS)}) SELECT * FROM unnest($1::text[], $2::bytea[], $3::text[], $4::bigint[])
                ON CONFLICT DO NOTHING""",
            *([list(column) for column in zip(*rows, strict=True)] or [[]] * len(COLUMNS)),
        )


async def keys(connection: Connection, tenant: str) -> list[Any]:
    """Every live version of the tenant's index key."""
    with mapped():
        return await connection.fetch(
            """SELECT k.* FROM encryption_keys k JOIN tenants t USING (tenant_id, generation)
               WHERE k.tenant_id = $1 AND k.scope_kind = 'tenant' AND k.scope_id = $2 AND k.key_material IS NOT NULL""",
            tenant,
            SCOPE_ID,
        )


async def find(connection: Connection, tenant: str, tokens: Sequence[bytes], after: tuple[str, int], limit: int) -> list[tuple[str, int]]:
    """The next (stream, position) behind `after` that has one of the tokens, in that order; events whose key is gone are none."""
    with mapped():
        rows = await connection.fetch(
            f"""SELECT DISTINCT b.stream_id, b.stream_position FROM blind_index b JOIN messages m USING (tenant_id, stream_id, stream_position)
                WHERE b.tenant_id = $1 AND b.token = ANY ($2) AND (b.stream_id, b.stream_position) > ($3, $4) AND {_LIVES} ORDER BY 1, 2 LIMIT $5""",
            tenant,
            tokens,
            *after,
            limit,
        )
    return [(row["stream_id"], row["stream_position"]) for row in rows]


async def is_indexed(connection: Connection, tenant: str, pointer: str) -> bool:
    """Whether a policy that can concern the tenant has the field in its index now."""
    with mapped():
        return bool(
            await connection.fetchval(
                "SELECT EXISTS (SELECT FROM encryption_policies WHERE tenant_id IN ($1, '*') AND $2 = ANY (blind_index))", tenant, pointer
            )
        )


async def any_gone(connection: Connection, scope: Scope) -> bool:
    """Has the scope rows of events whose key is gone?"""
    with mapped():
        return bool(await connection.fetchval(f"SELECT EXISTS ({_GONE.format(of=messages_of(scope))})", scope.tenant, scope.id))


async def remove_gone(connection: Connection, scope: Scope, limit: int) -> int:
    """Delete the next rows of the scope's events whose key is gone; -> how many."""
    with mapped():
        done = await connection.execute(
            f"""DELETE FROM blind_index b USING ({_GONE.format(of=messages_of(scope))} LIMIT $3) x
                WHERE b.tenant_id = x.tenant_id AND b.token = x.token AND b.stream_id = x.stream_id AND b.stream_position = x.stream_position""",
            scope.tenant,
            scope.id,
            limit,
        )
    return int(done.rpartition(" ")[2])
