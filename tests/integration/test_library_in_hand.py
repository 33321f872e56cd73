"""What a library process has in hand is never older than what stands in the database: refusals, keys, what is on its way."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sidecar import EncryptionConfig, Expected, Library, NewEvent, PolicySpec, WrongVersion, open_library
from sidecar.core.errors import AuthenticationFailed, KeyShredded, KmsUnavailable, LedgerBehind, MalformedRecord, RecordRefused, StoreUnavailable
from sidecar.core.model import Scope, ScopeKind
from sidecar.postgres import shreds, tenants
from sidecar.postgres.connection import connected
from sidecar.settings import Settings

EVENT = NewEvent(type="T", data="x")


@pytest.fixture
async def other(settings: Settings) -> AsyncIterator[Library]:
    """Another process on the same database."""
    async with open_library(settings, writer="library-other") as opened:
        yield opened


async def append(library: Library, stream: str, **more: Any) -> None:
    await library.store.append_to_stream(stream, [EVENT], tenant="acme", **more)


async def sql(library: Library, *statements: str) -> None:
    for statement in statements:
        await library.plain.pool.execute(statement)


async def test_a_refusal_that_was_lifted_is_not_answered_from_memory(library: Library) -> None:
    for stream in ("user-1", "user-2"):
        await append(library, stream)
    fences = {
        "stream": "INSERT INTO erased_scopes VALUES ('acme', 'stream', 'user-1', gen_random_uuid(), '{}')",
        "class": "INSERT INTO erased_scopes VALUES ('acme', 'class', 'unclassified', gen_random_uuid(), '{}')",
        "tenant": "UPDATE tenants SET state = 'shredded'",
    }
    for kind, fence in fences.items():
        await sql(library, fence, "UPDATE tenants SET epoch = epoch + 1")
        for _ in range(2):
            with pytest.raises(RecordRefused):
                await append(library, "user-1")
        lifted = "UPDATE tenants SET state = 'active'" if kind == "tenant" else "UPDATE erased_scopes SET readmitted_at = now()"
        await sql(library, lifted, "UPDATE tenants SET epoch = epoch + 1")
        await append(library, "user-1")


async def test_a_policy_that_no_longer_refuses_is_live_at_once(settings: Settings, other: Library) -> None:
    policies = settings.policies.model_copy(update={"unmatched": "refuse"})
    async with open_library(settings.model_copy(update={"policies": policies}), writer="library-test") as library:
        with pytest.raises(RecordRefused):
            await append(library, "person-1")
        await other.policies.create_policy(PolicySpec.model_validate({"class": "Person"}), actor="ann", reason="wanted")
        await append(library, "person-1")


async def test_a_kms_that_was_away_leaves_nothing_half_loaded(library: Library, other: Library, tmp_path: Path) -> None:
    await append(other, "user-1")
    shutil.move(tmp_path / "kek", tmp_path / "away")
    with pytest.raises(KmsUnavailable):
        await append(library, "user-1")
    shutil.move(tmp_path / "away", tmp_path / "kek")
    await append(library, "user-1")


async def test_a_tenant_that_is_forgotten_while_its_keys_are_loaded_is_loaded_again(
    library: Library, other: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any of the reads that loading is made of."""
    store = library.keys._store
    for number, read in enumerate(("tenants", "streams", "newest_keys")):
        await append(other, f"user-{number}")
        asked = getattr(store, read)
        times = 0

        async def moved(*arguments: Any, asked: Any = asked) -> Any:
            nonlocal times
            found = await asked(*arguments)
            if (times := times + 1) == 1:
                library.keys.forget("acme")
            return found

        library.keys.forget("acme")
        with monkeypatch.context() as patched:
            patched.setattr(store, read, moved)
            await append(library, f"user-{number}")
        assert times > (read != "tenants"), read  # that one is read before anything is in hand


async def test_a_plain_stream_that_somebody_else_encrypts_is_encrypted_from_then_on(library: Library, other: Library) -> None:
    await append(library, "cart-1")
    await append(other, "cart-1", encryption=EncryptionConfig())
    await append(library, "cart-1")
    rows = await library.plain.pool.fetch("SELECT data_encrypted IS NOT NULL AS sealed FROM messages ORDER BY stream_position")
    assert [row["sealed"] for row in rows] == [False, True, True]


async def test_text_goes_with_a_shred_of_its_stream_and_of_its_class(library: Library) -> None:
    """Also where policy seals events by class, or leaves them plain. Which class a stream without events has, nobody knows."""
    await library.policies.create_policy(PolicySpec.model_validate({"class": "Person", "key_scope": "class"}), actor="ann", reason="r")
    for kind, name in ((ScopeKind.STREAM, "person-1"), (ScopeKind.CLASS, "Person"), (ScopeKind.CLASS, "CartData")):
        stream = "cart-1" if name == "CartData" else "person-1" if kind is ScopeKind.STREAM else "person-2"
        text = await library.shredding.encrypt_event_data("secret", stream, "acme")
        assert await library.shredding.decrypt_event_data(text, stream, "acme") == "secret"
        if kind is ScopeKind.CLASS:
            await append(library, stream)
        async with library.plain.session() as session:
            scope = Scope(tenant="acme", kind=kind, id=name)
            taken = await shreds.take_keys(session.connection, scope, (await session.connection.fetchval("SELECT gen_random_uuid()")), None)
            await tenants.next_epoch(session.connection, "acme", shredding=False)
        assert taken.count, f"{scope}: nothing was found"
        with pytest.raises(KeyShredded):
            await library.shredding.decrypt_event_data(text, stream, "acme")


async def test_a_rotation_waits_for_nobody_without_end(library: Library) -> None:
    """A batch whose process stands still holds the guard: a rotation that queued behind it would stop every other batch of the stripe."""
    await append(library, "user-1")
    async with library.plain.session() as session:
        await library.store.append_to_stream("user-2", [EVENT], tenant="acme", session=session)
        async with asyncio.timeout(120):
            with pytest.raises(StoreUnavailable):
                await library.shredding.rotate_stream_key("user-1", "acme")
    await library.shredding.rotate_stream_key("user-1", "acme")


async def test_what_is_in_hand_is_bounded(library: Library) -> None:
    library.keys._max = 5
    for number in range(12):
        await append(library, f"user-{number}")
        await library.store.read_stream(f"user-{number}", tenant="acme")
        await library.shredding.encrypt_event_data("x", f"text-{number}", "acme")
    assert sum(len(ciphers) for _, ciphers in library.keys._opening.values()) <= 5
    assert len(library.keys._marked) <= 5


async def test_what_is_no_json_is_refused_and_not_quoted(library: Library) -> None:
    for stream in ("user-1", "cart-1"):
        for metadata in ({"email": {"jane@example.org"}}, {"email": "jane\0"}):
            if stream == "user-1" and metadata["email"] == "jane\0":
                continue  # sealed bytes can hold it
            with pytest.raises(MalformedRecord) as refused:
                await library.store.append_to_stream(stream, [NewEvent(type="T", data=1, metadata=metadata)], tenant="acme")
            assert "jane" not in str(refused.value)


async def test_keys_of_a_tenant_that_changed_leave_memory_without_being_asked_for_again(library: Library) -> None:
    for tenant in ("acme", "globex"):
        await library.store.append_to_stream("user-1", [EVENT], tenant=tenant)
        await library.store.read_stream("user-1", tenant=tenant)
    async with asyncio.timeout(120):
        while library.keys._opening.keys() != {"acme", "globex"}:
            for tenant in ("acme", "globex"):
                await library.store.append_to_stream("user-1", [EVENT], tenant=tenant)
                await library.store.read_stream("user-1", tenant=tenant)
        await sql(library, "UPDATE tenants SET epoch = epoch + 1 WHERE tenant_id = 'acme'")
        while "acme" in library.keys._opening or b"acme" in library.keys._streams.tenants:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert "globex" in library.keys._opening
    assert b"globex" in library.keys._streams.tenants


async def test_consumers_take_no_connection_from_those_who_append(settings: Settings) -> None:
    async with open_library(settings, max_connections=1, writer="library-test") as library:
        await append(library, "user-1")
        stop, seen = asyncio.Event(), []

        async def handle(held: Any) -> None:
            seen.append(held.data)
            await append(library, "cart-1")  # as a read model does
            if len(seen) >= 3:
                stop.set()

        async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
            for number in range(3):
                tasks.create_task(library.consumer(f"model-{number}", classes=["unclassified"]).run(handle, stop))
    assert seen == ["x"] * 3


async def test_a_name_that_the_ledger_knows_is_not_made_anew_by_an_append_without_keys(library: Library) -> None:
    """After a restore the ledger may have a shred of what the database has not heard of yet; `plain` asks no key for it."""
    entry = "INSERT INTO ledger (entry_id, command_id, tenant_ref, envelope) VALUES (gen_random_uuid(), gen_random_uuid(), tenant_ref('ghost'), '')"
    refs = [f"INSERT INTO erased_refs VALUES (scope_ref('acme', {scope}), tenant_ref('acme'), 'x', gen_random_uuid(), now())"
            for scope in ("'stream', 'cart-gone'", "'class', 'Gone'")]  # fmt: skip
    await append(library, "cart-1")
    await sql(library, entry, *refs)
    for tenant, stream, named in (("ghost", "cart-1", None), ("acme", "cart-gone", None), ("acme", "cart-2", "Gone")):
        with pytest.raises(StoreUnavailable):
            await library.plain.append_to_stream(stream, [EVENT], tenant=tenant, stream_class=named)
    assert await library.plain.pool.fetchval("SELECT count(*) FROM messages") == 1
    asked = {tuple(row) for row in await library.plain.pool.fetch("SELECT tenant_id, scope_kind, scope_id FROM foretold")}
    assert asked >= {("ghost", "tenant", "ghost"), ("acme", "stream", "cart-gone"), ("acme", "class", "Gone")}
    await library.plain.append_to_stream("cart-2", [EVENT], tenant="acme")


async def test_a_row_of_a_stream_that_is_not_on_record_is_no_plain_event(library: Library) -> None:
    """Who takes an encrypted stream off the record does not get his plaintext read for it."""
    await append(library, "user-1")
    await sql(library, "DELETE FROM streams", "UPDATE messages SET data = '\\x31', data_encrypted = NULL")
    for store in (library.store, library.plain):
        with pytest.raises(AuthenticationFailed):
            await store.read_stream("user-1", tenant="acme")


async def test_a_server_that_took_anothers_place_is_not_served_also_where_all_is_warm(library: Library, database: str) -> None:
    await append(library, "user-1")
    await append(library, "cart-1")
    await sql(library, "UPDATE ledger_watermark SET system_identifier = 'another', timeline = 1")
    assert library.keys._ledger is not None
    library.keys._ledger._passed = None  # as it is for a server that is not the one that it passed for
    async with connected(database) as outside:
        await outside.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'library-test%' AND datname = current_database()"
        )
    async with asyncio.timeout(120):
        for store in (library.store, library.plain):
            while True:
                try:
                    await store.append_to_stream("cart-1", [EVENT], tenant="acme")
                except LedgerBehind:
                    break
                except StoreUnavailable:  # a connection that ended
                    continue
                raise AssertionError("stored in a database that may be older than the ledger")


async def test_nobody_seals_with_a_key_that_is_not_on_record_yet(settings: Settings, other: Library) -> None:
    """Two streams share a key that is used up; who makes its successor is cancelled while that is written."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    limits = settings.limits.model_copy(update={"soft_uses": 4, "uses_block": 2})
    async with (
        open_library(settings.model_copy(update={"limits": limits}), writer="library-test") as library,
        connected(settings.postgres.for_role("data")) as stands,
    ):
        await other.policies.create_policy(PolicySpec.model_validate({"class": "Person", "key_scope": "class"}), actor="ann", reason="r")
        for stream in ("person-1", "person-1", "person-2", "person-2"):
            await append(library, stream)
        async with stands.transaction():
            await stands.execute("SELECT FROM encryption_keys WHERE scope_kind = 'class' FOR UPDATE")
            first, second = (asyncio.create_task(append(library, stream)) for stream in ("person-1", "person-2"))
            async with asyncio.timeout(120):
                while not await stands.fetchval(waiting):  # noqa: ASYNC110 (Postgres says when)
                    await asyncio.sleep(0.02)
            await asyncio.wait([second], timeout=0.5)
            first.cancel()
            await asyncio.wait([first])
        await second
    assert (await other.store.read_stream("person-2", tenant="acme")).version == 3


async def test_what_only_has_to_exist_is_appended_to_whatever_its_version_is_by_now(library: Library, other: Library) -> None:
    for stream in ("user-1", "cart-1"):
        with pytest.raises(WrongVersion):
            await append(library, stream, expected_version=Expected.STREAM_EXISTS)
        await append(other, stream)
        await append(library, stream, expected_version=Expected.STREAM_EXISTS)
        await append(other, stream)
        await append(library, stream, expected_version=Expected.STREAM_EXISTS)
        assert (await library.store.read_stream(stream, tenant="acme")).version == 4


async def test_a_version_that_the_data_plane_went_beyond_is_a_wrong_version(library: Library) -> None:
    """It writes rows before the position on the stream's record."""
    for stream in ("user-1", "cart-1"):
        await append(library, stream)
        await append(library, stream)
    await sql(library, "UPDATE streams SET position = 1")
    with pytest.raises(WrongVersion):
        await library.plain.append_to_stream("cart-1", [EVENT], tenant="acme", expected_version=1)
    for stream in ("user-1", "cart-1"):
        with pytest.raises(WrongVersion, match="went beyond"):
            await append(library, stream, expected_version=1)
        await append(library, stream)
        assert (await library.store.read_stream(stream, tenant="acme")).version == 3


async def test_persons_in_hand_are_bounded(library: Library) -> None:
    """Also where no stream is loaded any more."""
    await library.policies.create_policy(PolicySpec.model_validate({"class": "Person", "key_scope": "subject"}), actor="ann", reason="r")
    library.keys._streams._max = 5
    for number in range(30):
        event = NewEvent(type="T", data="x", subject=f"p{number}")
        await library.store.append_to_stream("person-1", [event], tenant="acme")
    assert library.keys._streams.ciphers() <= 15


async def test_what_can_be_forgotten_is_of_a_tenant_that_is_known(library: Library) -> None:
    for stream in (None, "user-1"):
        assert not await library.shredding.is_data_forgettable("acme", stream)
    await append(library, "user-1")
    for stream in (None, "user-1", "user-2"):
        assert await library.shredding.is_data_forgettable("acme", stream)


async def test_a_read_never_says_a_version_whose_events_it_has_not_seen(library: Library, other: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state of nothing at version 1 would let an append through that was decided without the event."""
    reading = library.plain._reading

    class Slow:
        def __init__(self, connection: Any) -> None:
            self.fetch, self._connection = connection.fetch, connection

        async def fetchval(self, *asked: Any) -> Any:
            if not await other.plain.pool.fetchval("SELECT count(*) FROM messages"):
                await append(other, "user-1")
            return await self._connection.fetchval(*asked)

    @asynccontextmanager
    async def slow(session: Any) -> AsyncIterator[Any]:
        async with reading(session) as connection:
            yield Slow(connection)

    monkeypatch.setattr(library.plain, "_reading", slow)
    found = await library.store.aggregate_stream("user-1", lambda count, _: count + 1, 0, tenant="acme")
    assert found.state == found.version


@pytest.mark.parametrize("read", ["subjects", "newest_keys"])
async def test_a_tenant_that_is_forgotten_while_a_persons_key_is_loaded_is_no_unknown_key(
    library: Library, other: Library, monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    """Nor an altered one: a rotation or a policy change beside it is every day's. The same where the index gets its key."""
    policy = {"class": "Person", "key_scope": "subject", "fields": ["/email"], "blind_index": ["/email"]}
    await other.policies.create_policy(PolicySpec.model_validate(policy), actor="ann", reason="r")
    event = NewEvent(type="T", data={"email": "x"}, subject="ann")
    await other.store.append_to_stream("person-1", [event], tenant="acme")
    store, asked = library.keys._store, getattr(library.keys._store, read)
    times = 0

    async def moved(*arguments: Any) -> Any:
        nonlocal times
        found = await asked(*arguments)
        if (times := times + 1) == 1:
            library.keys.forget("acme")
        return found

    monkeypatch.setattr(store, read, moved)
    await library.store.append_to_stream("person-1", [event], tenant="acme")
    assert times > 1


async def test_who_finds_a_tenant_moved_does_not_discard_what_others_have_loaded_since(library: Library) -> None:
    """Two that do come to no end: each takes away what the other one needs."""
    await append(library, "user-1")
    old = library.keys.in_hand("acme", "user-1")
    assert old is not None
    library.keys.let_go(old)
    assert library.keys.in_hand("acme", "user-1") is None
    await append(library, "user-1")
    library.keys.let_go(old)
    assert library.keys.in_hand("acme", "user-1") is not None
