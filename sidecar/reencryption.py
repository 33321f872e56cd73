"""A worker's part of a re-encryption: a chunk's streams, sealed under the keys that their writers use now. In place: same position, id and order.

Each step is one transaction, of at most ROWS events: guard, epoch and policy as of which the keys are in hand, open, seal, write where the row
is still as it was read, open again what was written, history. It may be killed anywhere; what is sealed already is not looked at twice.
A shred that came first has moved the epoch, so nothing of its scope is opened or sealed after it.

A copy into a new stream is made the same way, by the append that applications use: the same positions and ids, the other stream as it was.

Where policy seals by person, each event goes under its person's key: the person that it carries, or whom the policy's extractor names. What names
nobody, and what is of somebody who was erased, stays as it is and is counted.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import takewhile
from typing import Any, Final, TypeVar

from sidecar.contents import Content, bind_to, count_fields, headers_of, named, opened, person_of, read_contents, sealed
from sidecar.core.blind_index import tokens
from sidecar.core.envelope import PREFIX_BYTES, Sealer, stream_aad
from sidecar.core.errors import AuthenticationFailed, Conflict, RecordRefused
from sidecar.core.fields import Document
from sidecar.core.history import extended, overlaid, without
from sidecar.core.streams import SealingKey, Stream
from sidecar.core.view import guard_stripe
from sidecar.event_store import Ciphers
from sidecar.key_management import Held, KeyManagementService
from sidecar.postgres import blind_index, jobs
from sidecar.postgres.connection import Connection, Pool, transaction
from sidecar.postgres.errors import Moved
from sidecar.postgres.jobs import Chunk, Count
from sidecar.steps import failpoint

T = TypeVar("T")

ROWS: Final = 500
STREAMS_AT_ONCE: Final = 3
"""While Postgres writes one stream's events, another's are sealed."""
LOCK_MS: Final = 5000


class Reencryption:
    """Works off chunks, one at a time. Raises Unavailable: the chunk is begun again later."""

    def __init__(self, pool: Pool, keys: KeyManagementService, *, worker: str, rows_per_second: int | None = None) -> None:
        self._pool, self._keys, self._worker, self._rate = pool, keys, worker, rows_per_second
        self._erased: set[tuple[str, int | None, str]] = set()
        """Persons of the chunk who get no key, as of a tenant's epoch."""

    async def work(self, command_id: Any, number: int) -> None:
        """Returns when the chunk is done, by whomever."""
        async with transaction(self._pool) as connection:
            chunk = await jobs.begin(connection, command_id, number, self._worker)
            if chunk is None:
                return
            classes = await jobs.classes(connection, chunk.tenant, chunk.streams)
        self._erased.clear()
        self._keys.forget(chunk.tenant)  # what is warm may be from before the policy or the rotation that this is about
        count = await (self._all(chunk, classes) if chunk.into is None else self._copy(chunk, chunk.into, classes[chunk.streams[0]]))
        async with transaction(self._pool) as connection:
            await jobs.finish(connection, chunk, count.left, self._worker)

    async def _all(self, chunk: Chunk, classes: dict[str, str]) -> Count:
        slots = asyncio.Semaphore(1 if self._rate else STREAMS_AT_ONCE)

        async def one(stream: str) -> Count:
            async with slots:
                done = await self._stream(chunk, stream, classes[stream])
                failpoint("worker:stream")
                return done

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(stream)) for stream in chunk.streams]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return sum((task.result() for task in tasks), Count())

    async def _stream(self, chunk: Chunk, stream: str, stream_class: str) -> Count:
        count, before = Count(), 2**63 - 1
        while (step := await self._undisturbed(chunk.tenant, partial(self._step, chunk, stream, stream_class, before))) is not None:
            done, before = step
            count += done
            failpoint("worker:rows")
            if self._rate:
                await asyncio.sleep((done.resealed + done.left) / self._rate)
        if count.resealed:
            async with transaction(self._pool) as connection:
                await jobs.drop_unused_ranges(connection, chunk.tenant, stream)
        return count

    async def _undisturbed(self, tenant: str, step: Callable[[], Awaitable[T]]) -> T:
        """What comes of it, once nobody changed meanwhile what it stands on."""
        while True:
            try:
                return await step()
            except Conflict:
                self._keys.forget(tenant)
                await asyncio.sleep(0.01)

    async def _step(self, chunk: Chunk, stream: str, stream_class: str, before: int) -> tuple[Count, int] | None:
        """-> what became of the next events before that position, and how far it got; None if there is nothing left."""
        try:
            held = self._keys.in_hand(chunk.tenant, stream) or await self._keys.hold(chunk.tenant, stream, stream_class)
        except RecordRefused:
            return await self._leave(chunk, stream, before)
        if held.is_plain:
            return None  # plain, and to stay so
        rows = await self._rows(chunk, held.stream, before)
        if not rows:
            return None
        ciphers, keys, persons = await self._equipped(held, stream, rows)
        async with self._as_of(held, alone=any(row["data_encrypted"] is None for row in rows)) as connection:
            resealed = await self._reseal(connection, chunk, held, list(zip(rows, keys, persons, strict=True)), ciphers)
        return Count(resealed, len(rows) - resealed), rows[-1]["stream_position"]

    async def _equipped(self, held: Held, stream: str, rows: Sequence[Any]) -> tuple[Ciphers, list[SealingKey | None], list[str | None]]:
        """What opens the stream's rows; and for each the key that is to seal it and the person that it is about."""
        headers = {bytes(row["data_encrypted"][:PREFIX_BYTES]): row["data_encrypted"] for row in rows if row["data_encrypted"] is not None}
        epoch, ciphers = await self._keys.opening(held.tenant.id, headers_of(headers.values()))
        if epoch != held.as_of.epoch:
            raise Moved
        persons = await self._persons(held, stream, rows, ciphers)
        keys = await self._sealing(held, persons, [count_fields(row, held.stream.fields) for row in rows])
        if held.stream.fields is not None and held.stream.fields.indexed:
            await self._keys.index_key(held)
        failpoint("worker:opened")
        return ciphers, keys, persons

    async def _rows(self, chunk: Chunk, of: Stream, before: int) -> list[Any]:
        """What is not under the key that seals now, or is plain."""
        async with transaction(self._pool) as connection:
            if of.by_subject is not None:
                return await jobs.rows_not_of_persons(connection, chunk, of.id, of.by_subject.suite, before, ROWS)
            return await jobs.rows_not_under(connection, chunk, of.id, of.key.prefix if of.key else b"", before, ROWS)

    async def _persons(self, held: Held, stream: str, rows: Sequence[Any], ciphers: Ciphers) -> list[str | None]:
        """Whose each event is, where policy seals by person. None: it does not, or nobody is named."""
        by = held.stream.by_subject
        if by is None:
            return [None] * len(rows)
        async with self._as_of(held, alone=False):
            read = read_contents(held.tenant.id, stream, held.stream.fields, rows, ciphers)
        return [None if found is None else person_of(found[1], by.subject or "") for found in read]

    async def _sealing(self, held: Held, persons: Sequence[str | None], fields: Sequence[int]) -> list[SealingKey | None]:
        """A key per event; None for one of nobody, or of somebody who was erased."""
        if held.stream.by_subject is None:
            return list(await self._keys.sealing_keys(held, persons, fields if any(fields) else None))
        out: list[SealingKey | None] = [None] * len(persons)
        for person in dict.fromkeys(persons):
            numbers = [n for n, name in enumerate(persons) if name == person]
            if person is None or (held.tenant.id, held.as_of.epoch, person) in self._erased:
                continue
            try:
                keys = await self._keys.sealing_keys(held, [person] * len(numbers), [fields[n] for n in numbers])
            except RecordRefused:
                self._erased.add((held.tenant.id, held.as_of.epoch, person))
                raise Moved from None  # what was in hand is gone; next time without this person
            for n, key in zip(numbers, keys, strict=True):
                out[n] = key
        return out

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

    async def _reseal(
        self, connection: Connection, chunk: Chunk, held: Held, wanted: Sequence[tuple[Any, SealingKey | None, str | None]], ciphers: Ciphers
    ) -> int:
        """-> how many of the rows, each with its new key and its person. The rest does not open, has no key, or is no more as it was read."""
        of, to_seal = held.stream, []
        for (row, key, person), read in zip(
            wanted, read_contents(chunk.tenant, of.id, of.fields, [row for row, _, _ in wanted], ciphers), strict=True
        ):
            if key is not None and read is not None:
                to_seal.append((row, key, read[0], read[1] if person is None else named(read[1], person)))
        sealer = Sealer(sum(content.seals for *_, content in to_seal))
        new, made = [], {}
        for row, key, bind, content in to_seal:
            old = row["data_encrypted"] and bytes(row["data_encrypted"][:PREFIX_BYTES])
            new.append((row["stream_position"], old, *sealed(key, content, bind, sealer)))
            made[row["stream_position"]] = (key, bind, content)
        written = await jobs.replace(connection, chunk.tenant, of.id, new)
        under: dict[SealingKey, list[int]] = {}
        for row in sorted(written, key=lambda row: row["stream_position"]):
            key, bind, content = made[row["stream_position"]]
            if opened(key.cipher, bind, row) != content:
                raise AuthenticationFailed("what was written is not what was read")  # and the transaction is undone
            under.setdefault(key, []).append(row["stream_position"])
        if under:
            await self._note(connection, chunk.tenant, of, under)
            await _note_values(connection, held, [(row["stream_position"], made[row["stream_position"]][2]) for row in written])
            await jobs.add(connection, chunk, len(written))
        return len(written)

    @staticmethod
    async def _note(connection: Connection, tenant: str, of: Stream, under: dict[SealingKey, list[int]]) -> None:
        """The key history as it is now. `under`: ascending positions."""
        ranges, head = await jobs.lock_history(connection, tenant, of.id)
        key, first = next(iter(under)), min(positions[0] for positions in under.values())
        if of.by_subject is None:
            after = overlaid(ranges, under[key], key.key_id, key.version, head)
            await jobs.write_history(connection, tenant, of.id, ranges, after)
            await jobs.mark_sealed(connection, tenant, of.id, after[-1].key_id, key.suite.label, first)
            return
        theirs = await jobs.ranges_of(connection, tenant, of.id, [(key.key_id, key.version) for key in under])
        after = without(ranges, sorted(position for positions in under.values() for position in positions), head)
        for key, positions in under.items():
            after += extended([r for r in theirs if r[:2] == (key.key_id, key.version)], positions, key.key_id, key.version)
        await jobs.write_history(connection, tenant, of.id, [*ranges, *theirs], after)
        await jobs.mark_sealed(connection, tenant, of.id, None, key.suite.label, first)

    # into a new stream

    async def _copy(self, chunk: Chunk, into: str, stream_class: str) -> Count:
        """Every event of the stream, at the same position of the other one, up to the first that does not open or gets no key."""
        [stream], count = chunk.streams, Count()
        with suppress(RecordRefused):
            while copied := await self._undisturbed(chunk.tenant, partial(self._copy_some, chunk, stream, into, stream_class)):
                failpoint("worker:rows")
                count += Count(copied)
                if self._rate:
                    await asyncio.sleep(copied / self._rate)
        async with transaction(self._pool) as connection:
            theirs, ours = await jobs.heads(connection, chunk.tenant, [stream, into])
        return count + Count(0, theirs - ours)

    async def _copy_some(self, chunk: Chunk, stream: str, into: str, stream_class: str) -> int:
        """The next events, in one transaction. -> how many; 0 at the end, where one stands in the way, or where policy would leave the copy plain."""
        held = self._keys.in_hand(chunk.tenant, into) or await self._keys.hold(chunk.tenant, into, stream_class)
        async with transaction(self._pool) as connection:
            [head] = await jobs.heads(connection, chunk.tenant, [into])
            if held.is_plain or not await jobs.is_copy(connection, chunk.tenant, stream, into):
                return 0
            rows = await jobs.rows_behind(connection, chunk.tenant, stream, head, ROWS)
        if not rows:
            return 0
        ciphers, keys, persons = await self._equipped(held, stream, rows)
        async with self._as_of(held, alone=False) as connection:
            read = read_contents(chunk.tenant, stream, held.stream.fields, rows, ciphers)
            whole = list(takewhile(lambda each: each[1] is not None and each[3] is not None, zip(rows, keys, persons, read, strict=True)))
            if not whole:
                return 0
            contents = [found[1] if person is None else named(found[1], person) for _, _, person, found in whole if found is not None]
            sealer, of_stream = Sealer(sum(content.seals for content in contents)), stream_aad(chunk.tenant.encode(), into.encode())
            made = [(row, key, bind_to(of_stream, row), content) for (row, key, *_), content in zip(whole, contents, strict=True) if key is not None]
            written = await jobs.append_copies(
                connection, guard_stripe(chunk.tenant), chunk.tenant, into, held.stream.stream_class, head=head, epoch=held.as_of.epoch,
                policies=held.as_of.policy_version, copies=[(row, *sealed(key, content, bind, sealer)) for row, key, bind, content in made],
            )  # fmt: skip
            for row, (_, key, bind, content) in zip(written, made, strict=True):
                if opened(key.cipher, bind, row) != content:
                    raise AuthenticationFailed("what was written is not what was read")
            await _note_values(connection, held, [(row["stream_position"], content) for row, _, _, content in made])
            await jobs.add(connection, chunk, len(made))
        return len(made)


async def _note_values(connection: Connection, held: Held, written: Sequence[tuple[int, Content]]) -> None:
    """In the blind index, of fields that are in it by now. Raises Moved if the tenant was forgotten meanwhile, and its keys with it."""
    fields, key = held.stream.fields, held.tenant.index_key
    if fields is None or not fields.indexed:
        return
    if key is None:
        raise Moved
    documents = [(at, content.value) for at, content in written if isinstance(content.value, Document)]
    rows = [(held.tenant.id, token, held.stream.id, at) for at, document in documents for token in tokens(key, document, fields.indexed)]
    if rows:
        await blind_index.insert(connection, rows)
