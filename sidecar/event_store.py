"""Reading the store: rows become events, or say why not. Every decryption outside the pipeline's own replay passes `EventStore`.

Four different answers, never mixed up: the event; erased (its key was destroyed on command); an authentication failure (the bytes
are not what was sealed for this place); not now (the KMS or Postgres is away).
"""

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast
from uuid import UUID

from sidecar.core.aead import Cipher, Suite, lp
from sidecar.core.envelope import PREFIX_BYTES, Header, event_aad, open_envelope, parse_header, stream_aad
from sidecar.core.errors import AuthenticationFailed, KeyShredded, KeyUnavailable, RecordError, UnknownKey
from sidecar.core.fields import digest_lp, with_document
from sidecar.core.keys import Kek, TenantState
from sidecar.core.model import Erased, Event, Scope, ScopeKind
from sidecar.core.view import guard_stripe, opened
from sidecar.keys import KeyManagement, dek_row, kek_row, open_dek
from sidecar.ledger import LedgerGate
from sidecar.postgres.connection import Connection, Pool
from sidecar.postgres.errors import mapped
from sidecar.postgres.event_store import COLUMNS, event_of
from sidecar.postgres.keystore import KeyStore
from sidecar.postgres.scopes import messages_of

_OF_STREAM = COLUMNS + "WHERE m.tenant_id = $1 AND m.stream_id = $2 AND m.stream_position >= $3 ORDER BY m.stream_position LIMIT $4"
_OF_TENANT = (
    COLUMNS
    + """WHERE m.tenant_id = $1 AND m.stream_position >= $3 AND ($2::text IS NULL OR s.stream_type_class = $2)
ORDER BY m.transaction_id, m.global_position LIMIT $4"""
)
_SOMEBODY = Scope(tenant="", kind=ScopeKind.SUBJECT, id="")
_OF_SUBJECT = COLUMNS + f"WHERE {messages_of(_SOMEBODY)} AND m.stream_position >= $3 ORDER BY m.transaction_id, m.global_position LIMIT $4"
BY_SOURCE = COLUMNS + "WHERE m.source_id = $1 AND m.source_partition = $2 AND m.source_offset >= $3 AND m.source_offset < $4 ORDER BY m.source_offset"

CipherKey = tuple[str, UUID, int, Suite]


_NOT_ASKED = UnknownKey()


class Ciphers:
    """The opening ciphers of a set of rows: a cipher, or the reason why there is none."""

    def __init__(self, store: KeyStore, keys: KeyManagement) -> None:
        self._store, self._keys = store, keys
        self._known: dict[CipherKey, Cipher | KeyUnavailable | AuthenticationFailed] = {}

    def __len__(self) -> int:
        return len(self._known)

    async def load(self, rows: Sequence[Any]) -> None:
        """Unwrap what the rows' envelopes name; calls the KMS. Raises Unavailable: that is not the same as erased."""
        wanted: set[CipherKey] = set()
        for row in rows:
            if row["data_encrypted"] is not None:
                try:
                    header = parse_header(row["data_encrypted"])
                except RecordError:
                    continue
                wanted.add((row["tenant_id"], header.key_id, header.key_version, header.suite))
        await self._load(wanted)

    async def load_headers(self, tenant: str, headers: Iterable[Header]) -> None:
        """The same, of envelopes that were parsed already."""
        await self._load({(tenant, header.key_id, header.key_version, header.suite) for header in headers})

    async def _load(self, wanted: set[CipherKey]) -> None:
        # what was not known before may be by now: it is asked for again
        wanted = {key for key in wanted if isinstance(self._known.get(key, _NOT_ASKED), UnknownKey)}
        if not wanted:
            return
        states: dict[str, Any] = {}
        keks: dict[str, dict[int, Kek]] = {}
        try:
            for row in await self._store.tenants(sorted({w[0] for w in wanted})):
                states[row["tenant_id"]] = row
                if row["kek_version"] is not None and row["state"] == TenantState.ACTIVE:
                    keks.setdefault(row["tenant_id"], {})[row["kek_version"]] = await self._keys.open_kek(kek_row(row))
            rows_of = {(r["tenant_id"], r["key_id"], r["key_version"]): r for r in await self._store.keys({w[:3] for w in wanted})}
            for key in wanted:
                self._known[key] = self._cipher(states.get(key[0]), rows_of.get(key[:3]), keks.get(key[0], {}), key[3])
        finally:
            for of_tenant in keks.values():
                for kek in of_tenant.values():
                    kek.destroy()

    @staticmethod
    def _cipher(tenant: Any, record: Any, keks: dict[int, Kek], suite: Suite) -> Cipher | KeyUnavailable | AuthenticationFailed:
        if tenant is not None and tenant["state"] != TenantState.ACTIVE:
            return KeyShredded()
        if tenant is None or record is None:
            return UnknownKey()
        if record["generation"] < tenant["generation"]:
            return KeyShredded()
        try:
            return open_dek(keks, dek_row(record)).into_cipher(suite)
        except (KeyUnavailable, AuthenticationFailed) as error:
            return error

    def get(self, tenant: str, header: Header) -> Cipher:
        """Raises KeyShredded, UnknownKey or AuthenticationFailed (a key row that was altered)."""
        found = self._known.get((tenant, header.key_id, header.key_version, header.suite), UnknownKey())
        if isinstance(found, KeyUnavailable | AuthenticationFailed):
            raise found
        return found


def open_row(row: Any, ciphers: Ciphers) -> Event:
    """The event of a row. Raises KeyShredded, UnknownKey, AuthenticationFailed, MalformedEnvelope, UnsupportedEnvelope."""
    event = event_of(row)
    sealed = event.sealed
    if sealed is None:
        return event
    bind = partial(
        event_aad,
        stream_aad(event.tenant.encode(), event.stream.encode()),
        event.position,
        lp(event.message_id.encode()),
        lp(event.type.encode()),
        event.schema_version,
    )
    prefix, cipher = sealed[:PREFIX_BYTES], ciphers.get(event.tenant, parse_header(sealed))
    read = opened(event, open_envelope(cipher, sealed, bind(digest_lp(event.value), prefix)))
    return read if event.value is None else with_document(read, event.value, prefix, bind, partial(open_envelope, cipher))


class EventStore:
    """Reads a tenant's events, decrypted, under the guard: after a shred's receipt no call that starts here decrypts its scope."""

    def __init__(self, pool: Pool, keys: KeyManagement, ledger: LedgerGate) -> None:
        self._pool, self._keys, self._ledger = pool, keys, ledger

    async def read(
        self,
        tenant: str,
        *,
        stream: str | None = None,
        stream_class: str | None = None,
        subject: str | None = None,
        from_position: int = 1,
        limit: int = 1000,
    ) -> list[tuple[Any, Event | Erased | RecordError | UnknownKey]]:
        """Rows with what they hold; of a stream, a class, a person or the whole tenant. An event that cannot be opened is an answer; Unavailable is raised."""
        sql, second = (_OF_STREAM, stream) if stream is not None else (_OF_SUBJECT, subject) if subject is not None else (_OF_TENANT, stream_class)
        while True:
            ciphers = Ciphers(KeyStore(self._pool), self._keys)
            epoch = await self._epoch(tenant)
            with mapped():
                async with self._pool.acquire() as connection:
                    rows = await connection.fetch(sql, tenant, second, from_position, limit)
            await ciphers.load(rows)
            async with self._guard(tenant) as now:
                if now == epoch:
                    return [(row, self._open(row, ciphers)) for row in rows]

    async def _epoch(self, tenant: str) -> int | None:
        with mapped():
            async with self._pool.acquire() as held:
                connection = cast(Connection, held)
                await self._ledger.check(connection)
                epoch: int | None = await connection.fetchval("SELECT epoch FROM tenants WHERE tenant_id = $1", tenant)
                return epoch

    @asynccontextmanager
    async def _guard(self, tenant: str) -> AsyncIterator[int | None]:
        """Shared guard of the tenant for the length of a block; gives the epoch as it stands under it."""
        with mapped():
            async with self._pool.acquire() as connection, connection.transaction():
                await connection.execute("SELECT pg_advisory_xact_lock_shared(1, $1)", guard_stripe(tenant))
                yield await connection.fetchval("SELECT epoch FROM tenants WHERE tenant_id = $1", tenant)

    @staticmethod
    def _open(row: Any, ciphers: Ciphers) -> Event | Erased | RecordError | UnknownKey:
        try:
            return open_row(row, ciphers)
        except KeyShredded:
            return Erased(
                tenant=row["tenant_id"],
                stream=row["stream_id"],
                position=row["stream_position"],
                message_id=row["message_id"],
                type=row["message_type"],
            )
        except (RecordError, UnknownKey) as error:
            return error
