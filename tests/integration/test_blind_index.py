"""Search by an encrypted field's value, against the real database: who is found, who is not, and what a rotation, another KEK or a policy changes."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sidecar import Library, NewEvent, PolicySpec
from sidecar.blind_index import Found
from sidecar.core.errors import CommandRejected, ConfigurationError, MalformedRecord, UnknownKey, WrongVersion
from sidecar.core.model import Scope, ScopeKind
from sidecar.key_management import KeyName
from sidecar.keys import kek_row
from sidecar.postgres import blind_index
from sidecar.postgres.connection import transaction
from sidecar.rekeying import Rekeying


@pytest.fixture
async def library(library: Library) -> AsyncIterator[Library]:
    specs = [
        PolicySpec(stream_class="Person", fields=("/email", "/tags/*", "/age"), blind_index=("/email", "/tags/*", "/age")),
        PolicySpec(stream_class="Order", fields=("/email",), blind_index=("/email",), key_scope="class"),
    ]
    for spec in specs:
        await library.policies.create_policy(spec, actor="ann", reason="a test")
    yield library


async def append(library: Library, stream: str, *data: Any, tenant: str = "acme", stream_class: str = "Person", **how: Any) -> None:
    events = [NewEvent(type="T", data=one) for one in data]
    await library.store.append_to_stream(stream, events, tenant=tenant, stream_class=stream_class, **how)


async def found(library: Library, value: Any, field: str = "/email", tenant: str = "acme", **how: Any) -> list[tuple[str, int]]:
    return [(event.stream, event.position) for event in await library.find_by_field(tenant, field, value, **how)]


async def test_events_are_found_by_the_value_of_an_encrypted_field_in_every_class_of_the_tenant(library: Library) -> None:
    await append(library, "p-1", {"email": "jane"}, {"email": "joan", "age": 41}, {"email": "jane", "tags": ["x", "y"], "age": 41.0})
    await append(library, "o-1", {"email": "jane"}, stream_class="Order")
    await append(library, "p-1", {"email": "jane"}, tenant="globex")
    assert await found(library, "jane") == [("o-1", 1), ("p-1", 1), ("p-1", 3)]
    assert await found(library, "jane", after=Found("o-1", 1), limit=1) == [("p-1", 1)]
    assert await found(library, "Jane") == []
    assert await found(library, 41, "/age") == await found(library, 41.0, "/age") == [("p-1", 2), ("p-1", 3)]
    assert await found(library, "x", "/tags/*") == [("p-1", 3)]
    assert await found(library, "jane", "/tags/*") == []
    assert await found(library, "jane", tenant="globex") == [("p-1", 1)]
    assert await found(library, "jane", tenant="nobody") == []
    with pytest.raises(ConfigurationError, match="no policy indexes /name"):
        await found(library, "jane", "/name")
    for bad in (None, {"a": 1}, [1], object()):
        with pytest.raises(MalformedRecord):
            await found(library, bad)


async def test_tokens_are_other_ones_in_another_tenant_and_hold_no_value(library: Library) -> None:
    for tenant in ("acme", "globex"):
        await append(library, "p-1", {"email": "jane@example.org"}, tenant=tenant)
    rows = await library.plain.pool.fetch("SELECT * FROM blind_index ORDER BY tenant_id")
    assert [(row["tenant_id"], row["stream_id"], row["stream_position"], len(row["token"])) for row in rows] == [
        ("acme", "p-1", 1, 32),
        ("globex", "p-1", 1, 32),
    ]
    assert rows[0]["token"] != rows[1]["token"]
    keys = await library.plain.pool.fetch("SELECT scope_kind, key_material FROM encryption_keys WHERE scope_id = '#blind-index'")
    assert [(row["scope_kind"], len(row["key_material"])) for row in keys] == [("tenant", 92)] * 2


async def test_an_append_that_comes_to_nothing_leaves_nothing_in_the_index(library: Library) -> None:
    await append(library, "p-1", {"email": "jane"})
    with pytest.raises(WrongVersion):
        await append(library, "p-1", {"email": "joan"}, expected_version=7)
    with pytest.raises(RuntimeError):
        async with library.store.session() as session:
            await append(library, "p-1", {"email": "joan"}, session=session)
            raise RuntimeError
    assert await library.plain.pool.fetchval("SELECT count(*) FROM blind_index") == 1
    async with library.store.session() as session:
        await append(library, "p-1", {"email": "joan"}, session=session)
    assert await found(library, "joan") == [("p-1", 2)]


async def test_a_rotation_and_another_tenant_key_leave_every_event_to_be_found(library: Library) -> None:
    await append(library, "p-1", {"email": "jane"})
    await library.keys.rotate_key(Scope.of_tenant("acme"))
    await append(library, "p-1", {"email": "jane"})
    versions = await library.plain.pool.fetch("SELECT key_version, is_active FROM encryption_keys WHERE scope_id = '#blind-index' ORDER BY 1")
    assert [tuple(row) for row in versions] == [(1, False), (2, True)]
    assert await library.plain.pool.fetchval("SELECT count(DISTINCT token) FROM blind_index") == 2
    assert await found(library, "jane") == [("p-1", 1), ("p-1", 2)]
    assert await library.shredding.cleanup_old_keys(0, "acme") == 0, "the stream's old version is needed, and so is the index's"

    rekeying = Rekeying(library.plain.pool, library.keys._clock, library.keys._keys)
    [newest] = await rekeying._rows("acme")
    made = await rekeying._start(kek_row(newest), "a test")
    while not await rekeying._finish(made, await rekeying._move(made, "a test"), "a test"):
        pass
    assert await library.plain.pool.fetchval("SELECT min(kek_version) FROM encryption_keys WHERE tenant_id = 'acme'") == 2
    await append(library, "p-1", {"email": "jane"})
    assert await found(library, "jane") == [("p-1", 1), ("p-1", 2), ("p-1", 3)]


async def test_control_a_row_whose_events_key_is_gone_is_not_found_though_it_is_there(library: Library) -> None:
    await append(library, "p-1", {"email": "jane"})
    await append(library, "p-2", {"email": "jane"})
    assert await found(library, "jane") == [("p-1", 1), ("p-2", 1)]
    await library.plain.pool.execute("UPDATE encryption_keys SET key_material = NULL, is_destroyed = true WHERE scope_id = 'p-1'")
    assert await found(library, "jane") == [("p-2", 1)]
    assert await library.plain.pool.fetchval("SELECT count(*) FROM blind_index") == 2
    await library.plain.pool.execute("UPDATE messages SET data_encrypted = '\\x4b53' WHERE stream_id = 'p-2'")
    assert await found(library, "jane") == [], "bytes that are no envelope name no key"


async def test_a_field_is_in_the_index_from_the_policy_on(library: Library) -> None:
    made = await library.policies.create_policy(PolicySpec(stream_class="Late", fields=("/vat",)), actor="ann", reason="a test")
    await append(library, "l-1", {"vat": "DE1"}, stream_class="Late")
    with pytest.raises(ConfigurationError):
        await found(library, "DE1", "/vat")
    await library.policies.update_policy(made.policy_id, {"blind_index": ["/vat"]}, actor="ann", reason="a test")
    assert await found(library, "DE1", "/vat") == []
    await append(library, "l-1", {"vat": "DE1"})
    assert await found(library, "DE1", "/vat") == [("l-1", 2)]
    for bad in ({"blind_index": ["/other"]}, {"fields": []}):
        with pytest.raises(ConfigurationError):
            await library.policies.update_policy(made.policy_id, bad, actor="ann", reason="a test")


@pytest.mark.parametrize(("kind", "name"), [(ScopeKind.STREAM, "p-1"), (ScopeKind.CLASS, "Person"), (ScopeKind.TENANT, "acme")])
async def test_rows_are_removed_in_chunks_of_the_scope_alone_and_only_where_the_key_is_gone(library: Library, kind: ScopeKind, name: str) -> None:
    await append(library, "p-1", *({"email": f"jane-{n}"} for n in range(5)))
    await append(library, "o-1", {"email": "jane"}, stream_class="Order")
    scope = Scope(tenant="acme", kind=kind, id=name)
    async with transaction(library.plain.pool) as connection:
        assert await blind_index.remove_gone(connection, scope, 100) == 0, "control: their keys live"
        await connection.execute("UPDATE encryption_keys SET key_material = NULL, is_destroyed = true WHERE scope_id IN ('p-1', 'Order')")
        counts = [await blind_index.remove_gone(connection, scope, 2) for _ in range(4 if kind is ScopeKind.TENANT else 5)]
        assert counts == ([2, 2, 2, 0] if kind is ScopeKind.TENANT else [2, 2, 1, 0, 0])
        left = await connection.fetchval("SELECT count(*) FROM blind_index")
    assert left == (0 if kind is ScopeKind.TENANT else 1)


async def test_no_row_outlives_its_event(library: Library) -> None:
    """Of what retention deleted a shred would find no row."""
    await append(library, "p-1", {"email": "jane"}, {"email": "joan"})
    await library.plain.pool.execute("DELETE FROM messages WHERE stream_position = 1")
    assert [row["stream_position"] for row in await library.plain.pool.fetch("SELECT stream_position FROM blind_index")] == [2]


async def test_an_index_key_that_cannot_be_opened_is_an_error_and_no_endless_search(library: Library) -> None:
    await append(library, "p-1", {"email": "jane"})
    await library.plain.pool.execute("UPDATE encryption_keys SET kek_version = 9 WHERE scope_id = '#blind-index'")
    async with asyncio.timeout(120):
        with pytest.raises(UnknownKey):
            await found(library, "jane")


async def test_the_key_of_the_index_is_not_destroyed_alone(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scope is the tenant: the command would be the tenant's shred."""
    sent: list[Any] = []

    async def send(*command: Any) -> Any:
        sent.append(command)

    await append(library, "p-1", {"email": "jane"})
    [row] = await library.plain.pool.fetch("SELECT key_id, key_version FROM encryption_keys WHERE scope_id = '#blind-index'")
    monkeypatch.setattr(library.keys, "_send", send)
    with pytest.raises(CommandRejected):
        await library.keys.destroy("acme", KeyName(key_id=row["key_id"], key_version=row["key_version"]), reason="a test")
    assert sent == []
