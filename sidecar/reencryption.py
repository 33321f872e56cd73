"""A worker's part of a re-encryption: a chunk's streams, sealed under the keys that their writers use now. In place: same position, id and order.

Each step is one transaction, of at most ROWS events: guard, epoch and policy as of which the keys are in hand, open, seal, write where the row
is still as it was read, open again what was written, history. It may be killed anywhere; what is sealed already is not looked at twice.
A shred that came first has moved the epoch, so nothing of its scope is opened or sealed after it.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, NamedTuple

import orjson

from sidecar.core.aead import lp
from sidecar.core.envelope import NO_FIELD, PREFIX_BYTES, TEXT_PREFIX, Sealer, event_aad, open_envelope, parse_header, seal, stream_aad
from sidecar.core.errors import AuthenticationFailed, Conflict, KeyUnavailable, MalformedRecord, RecordError, RecordRefused
from sidecar.core.fields import Bind, Document, Fields, digest_lp, open_document, seal_document
from sidecar.core.history import overlaid
from sidecar.core.streams import SealingKey, Stream
from sidecar.core.view import frame, guard_stripe, unframe
from sidecar.event_store import Ciphers
from sidecar.key_management import Held, KeyManagementService
from sidecar.postgres import jobs
from sidecar.postgres.connection import Connection, Pool, transaction
from sidecar.postgres.errors import Moved
from sidecar.postgres.jobs import Chunk, Count
from sidecar.steps import failpoint

ROWS: Final = 500
LOCK_MS: Final = 5000


class Reencryption:
    """Works off chunks, one at a time. Raises Unavailable: the chunk is begun again later."""

    def __init__(self, pool: Pool, keys: KeyManagementService, *, worker: str, rows_per_second: int | None = None) -> None:
        self._pool, self._keys, self._worker, self._rate = pool, keys, worker, rows_per_second

    async def work(self, command_id: Any, number: int) -> None:
        """Returns when the chunk is done, by whomever."""
        async with transaction(self._pool) as connection:
            chunk = await jobs.begin(connection, command_id, number, self._worker)
            if chunk is None:
                return
            classes = await jobs.classes(connection, chunk.tenant, chunk.streams)
        count = Count()
        for stream in chunk.streams:
            count += await self._stream(chunk, stream, classes[stream])
            failpoint("worker:stream")
        async with transaction(self._pool) as connection:
            await jobs.finish(connection, chunk, count.left, self._worker)

    async def _stream(self, chunk: Chunk, stream: str, stream_class: str) -> Count:
        count, before = Count(), 2**63 - 1
        while True:
            try:
                step = await self._step(chunk, stream, stream_class, before)
            except (Moved, Conflict):
                self._keys.forget(chunk.tenant)
                await asyncio.sleep(0.01)
                continue
            if step is None:
                return count
            done, before = step
            count += done
            failpoint("worker:rows")
            if self._rate:
                await asyncio.sleep((done.resealed + done.left) / self._rate)

    async def _step(self, chunk: Chunk, stream: str, stream_class: str, before: int) -> tuple[Count, int] | None:
        """-> what became of the next events before that position, and how far it got; None if there is nothing left."""
        try:
            held = self._keys.in_hand(chunk.tenant, stream) or await self._keys.hold(chunk.tenant, stream, stream_class)
        except RecordRefused:
            return await self._leave(chunk, stream, before)
        if held.as_of.epoch is None:
            return None  # plain, and to stay so
        if held.stream.key is None:
            return await self._leave(chunk, stream, before)  # persons' keys
        async with transaction(self._pool) as connection:
            rows = await jobs.rows_not_under(connection, chunk, stream, held.stream.key.prefix, before, ROWS)
        if not rows:
            return None
        fields = [_count_fields(row, held.stream.fields) for row in rows]
        [key, *_] = await self._keys.sealing_keys(held, [None] * len(rows), fields if any(fields) else None)
        headers = {bytes(row["data_encrypted"][:PREFIX_BYTES]): row["data_encrypted"] for row in rows if row["data_encrypted"] is not None}
        epoch, ciphers = await self._keys.opening(chunk.tenant, _headers(headers.values()))
        if epoch != held.as_of.epoch:
            raise Moved
        failpoint("worker:opened")
        async with self._as_of(held, alone=any(row["data_encrypted"] is None for row in rows)) as connection:
            resealed = await self._reseal(connection, chunk, held.stream, rows, key, ciphers)
        return Count(resealed, len(rows) - resealed), rows[-1]["stream_position"]

    async def _leave(self, chunk: Chunk, stream: str, before: int) -> tuple[Count, int] | None:
        async with transaction(self._pool) as connection:
            rows = await jobs.rows_not_under(connection, chunk, stream, b"", before, ROWS)
        return (Count(0, len(rows)), rows[-1]["stream_position"]) if rows else None

    @asynccontextmanager
    async def _as_of(self, held: Held, *, alone: bool) -> AsyncIterator[Connection]:
        """A transaction under the tenant's guard; Moved if the keys in hand are not those of now.

        `alone`: no writer at the same time, else one that began before the policy did would leave plaintext in an encrypted stream.
        """
        async with transaction(self._pool) as connection:
            await connection.execute(f"SET LOCAL lock_timeout = {LOCK_MS}")
            if alone:
                await connection.execute("SELECT pg_advisory_xact_lock(1, $1)", guard_stripe(held.tenant.id))
            now = await connection.fetchrow("SELECT epoch, policies FROM guarded($1, $2)", guard_stripe(held.tenant.id), held.tenant.id)
            if not self._is_now(held, now):
                raise Moved
            yield connection

    @staticmethod
    def _is_now(held: Held, now: Any) -> bool:
        return now is not None and (now["epoch"], now["policies"]) == (held.as_of.epoch, held.as_of.policy_version)

    async def _reseal(self, connection: Connection, chunk: Chunk, of: Stream, rows: Sequence[Any], key: SealingKey, ciphers: Ciphers) -> int:
        stream, of_stream = of.id, stream_aad(chunk.tenant.encode(), of.id_lp[4:])
        new: list[tuple[int, bytes | None, bytes, bytes | None]] = []
        read: dict[int, tuple[dict[str, Any], Content]] = {}
        for row in rows:
            try:
                content = _plain(row, of.fields) if row["data_encrypted"] is None else _opened(chunk.tenant, of_stream, row, ciphers)
            except (RecordError, KeyUnavailable):
                continue  # altered, shredded or unknown: it stays as it is, and is counted
            at, old = row["stream_position"], row["data_encrypted"] and bytes(row["data_encrypted"][:PREFIX_BYTES])
            new.append((at, old, *_sealed(key, content, partial(_aad, of_stream, row))))
            read[at] = (dict(row), content)
        written = await jobs.replace(connection, chunk.tenant, stream, new)
        for row in written:
            before, content = read[row["stream_position"]]
            if _opened(chunk.tenant, of_stream, before | dict(row), key) != content:
                raise AuthenticationFailed("what was written is not what was read")  # and the transaction is undone
        if written:
            ranges, head = await jobs.lock_history(connection, chunk.tenant, stream)
            positions = sorted(row["stream_position"] for row in written)
            after = overlaid(ranges, positions, key.key_id, key.version, head)
            await jobs.write_history(connection, chunk.tenant, stream, ranges, after, key.suite.label, positions[0])
            await jobs.add(connection, chunk, len(written))
        return len(written)


def _headers(envelopes: Any) -> list[Any]:
    out = []
    for envelope in envelopes:
        try:
            out.append(parse_header(bytes(envelope)))
        except RecordError:
            continue  # of a row that will be left alone
    return out


def _aad(of_stream: bytes, row: Any, field_lp: bytes, prefix: bytes) -> bytes:
    id_lp, type_lp = lp(row["message_id"].encode()), lp(row["message_type"].encode())
    return event_aad(of_stream, row["stream_position"], id_lp, type_lp, row["schema_version"], field_lp, prefix)


class Content(NamedTuple):
    """Of an event: its attributes, and its value or the document of which fields are sealed. An event keeps its form when it is sealed anew."""

    attributes: bytes
    value: bytes | Document


def _count_fields(row: Any, fields: Fields | None) -> int:
    """How many seals beside the event's own it takes at most."""
    if row["data"] is None:
        return 0
    if row["data_encrypted"] is not None:
        return bytes(row["data"]).count(b'"' + TEXT_PREFIX.encode())
    value = _plain(row, fields).value
    return len(value.places) if isinstance(value, Document) else 0


def _plain(row: Any, fields: Fields | None) -> Content:
    """A plain event, to be sealed as policy says; whole, where its fields cannot be told from the rest."""
    attributes, value = orjson.dumps(row["metadata"] or {}), row["data"] or b""
    if fields is not None and row["data"] is not None:
        try:
            return Content(attributes, fields.find(value))
        except MalformedRecord:
            pass
    return Content(attributes, value)


def _opened(tenant: str, of_stream: bytes, row: Any, ciphers: Ciphers | SealingKey) -> Content:
    sealed, stored = bytes(row["data_encrypted"]), row["data"]
    cipher = ciphers.cipher if isinstance(ciphers, SealingKey) else ciphers.get(tenant, parse_header(sealed))
    prefix, bind = sealed[:PREFIX_BYTES], partial(_aad, of_stream, row)
    attributes, value = unframe(open_envelope(cipher, sealed, bind(digest_lp(stored), prefix)))
    return Content(attributes, value if stored is None else open_document(stored, value, prefix, bind, partial(open_envelope, cipher)))


def _sealed(key: SealingKey, content: Content, bind: Bind) -> tuple[bytes, bytes | None]:
    """-> the envelope, and the document beside it."""
    attributes, value = content
    if not isinstance(value, Document):
        return seal(key.cipher, key.prefix, bind(NO_FIELD, key.prefix), frame(attributes, value)), None
    stored, envelope = seal_document(value, attributes, key.prefix, bind, partial(Sealer(len(value.places) + 1).seal, key.cipher))
    return envelope, stored
