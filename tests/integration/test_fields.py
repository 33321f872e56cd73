"""Field-level encryption in the library, against the real database: the rest stays JSON that SQL can ask, everything else is as of any encrypted event."""

import asyncio
import json
from typing import Any

import orjson
import pytest

from sidecar import (
    DecryptionConfig,
    EncryptionConfig,
    Erased,
    Event,
    Library,
    MemoryEventStore,
    NewEvent,
    PolicySpec,
    create_crypto_event_store,
    open_library,
)
from sidecar.core.errors import AccessDenied, AuthenticationFailed, ConfigurationError, MalformedRecord, SidecarError
from sidecar.core.store import Unreadable
from sidecar.postgres.connection import Pool
from sidecar.settings import Settings

FIELDS = ("/email", "/address/*", "/tags/*/of")
JANE = {
    "email": "jane@example.org",
    "plan": "pro",
    "age": 41,
    "address": {"street": "12 Elm Street", "zip": 12345, "note": None, "old": {"a": [True, 1.5]}},
    "tags": [{"of": "jane", "n": 1}, {"n": 2}],
}
SECRETS = ("jane", "Elm Street", "12345", "1.5")


@pytest.fixture
async def policy(library: Library) -> str:
    made = await library.policies.create_policy(PolicySpec(stream_class="Person", fields=FIELDS), actor="ann", reason="a test")
    return made.policy_id


async def append(library: Library, *data: Any, stream: str = "person-1", **how: Any) -> None:
    await library.store.append_to_stream(stream, [NewEvent(type="T", data=one, metadata={"by": "jane"}) for one in data], tenant="acme", **how)


async def read(library: Library, stream: str = "person-1") -> list[Any]:
    events = (await library.store.read_stream(stream, tenant="acme")).events
    return [event.data if isinstance(event, Event) else type(event) for event in events]


async def stored(library: Library) -> list[dict[str, Any]]:
    return [dict(row) for row in await library.plain.pool.fetch("SELECT * FROM messages ORDER BY stream_id, stream_position")]


async def all_of(library: Library, count: int) -> list[Any]:
    """Transactions of others on the same server hold up the global order; they end."""
    async with asyncio.timeout(120):
        while len(found := await library.store.read_all(tenant="acme")) < count:  # noqa: ASYNC110 (other databases' transactions count too)
            await asyncio.sleep(0.05)
    return [event for _, event in found]


async def clear_of(pool: Pool, words: tuple[str, ...]) -> list[str]:
    """Which words stand anywhere in the table, in whatever column: the search for plaintext."""
    text = "\n".join(row[0] for row in await pool.fetch("SELECT m::text || coalesce(convert_from(m.data, 'UTF8'), '') FROM messages m"))
    return [word for word in words if word in text or word.encode().hex() in text]


async def test_named_fields_are_sealed_and_the_rest_is_json_that_sql_can_ask(library: Library, policy: str) -> None:
    await append(library, JANE, {"plan": "free"}, None)
    assert await read(library) == [JANE, {"plan": "free"}, None]
    first, second, tombstone = await stored(library)
    document = json.loads(first["data"])
    assert {**document, "email": "", "address": "", "tags": ""} == {**JANE, "email": "", "address": "", "tags": ""}
    assert list(document) == list(JANE)
    sealed = [document["email"], *document["address"].values(), document["tags"][0]["of"]]
    assert all(isinstance(text, str) and text.startswith("ks1.") for text in sealed)
    assert (document["tags"][0]["n"], document["tags"][1]) == (1, {"n": 2})
    assert (first["metadata"], json.loads(second["data"])) == (None, {"plan": "free"})
    assert (tombstone["data"], tombstone["is_tombstone"], tombstone["data_encrypted"] is not None) == (None, True, True)
    found = await library.plain.pool.fetch("SELECT stream_position FROM messages WHERE convert_from(data, 'UTF8')::jsonb ->> 'plan' = 'pro'")
    assert [row["stream_position"] for row in found] == [1]
    assert await clear_of(library.plain.pool, SECRETS) == []
    assert await clear_of(library.plain.pool, ("pro", "41")) == ["pro", "41"], "control: the search finds what is in clear"
    stream = await library.plain.pool.fetchrow("SELECT is_encrypted, encrypted_from_position FROM streams")
    assert tuple(stream) == (True, 1)


async def test_values_come_back_to_the_byte_and_unopened_as_texts(library: Library, policy: str) -> None:
    raw = b' {"email" : 123456789012345678901234567890.10, "plan":\t1e3 } \n'
    await append(library, raw)
    [event] = (await library.store.read_stream("person-1", tenant="acme")).events
    assert isinstance(event, Event)
    assert (event.value, event.data, event.metadata["by"]) == (raw, raw, "jane")
    assert set(event.metadata["enc"]) == {"algo", "keyId", "keyVersion", "iv", "aadHash"}
    [unopened] = (await library.store.read_stream("person-1", tenant="acme", decryption=DecryptionConfig(decrypt_data=False))).events
    assert isinstance(unopened, Event)
    assert unopened.data["email"].startswith("ks1.")
    assert unopened.data["plan"] == 1000.0


@pytest.mark.parametrize("data", [b"no JSON", b"", b'{"email":1,"email":2}', {"address": "12 Elm Street"}, "text", 7, b'{"x":{"a":1,"a":2}}'])
async def test_what_holds_no_fields_is_refused_and_nothing_of_it_is_stored(library: Library, policy: str, data: Any) -> None:
    with pytest.raises(MalformedRecord) as refused:
        await append(library, JANE, data)
    assert refused.value.reason == "bad_document"
    assert await stored(library) == []
    assert await read(library) == []
    await append(library, JANE)
    assert await read(library) == [JANE]


async def tamper(library: Library, how: str) -> None:
    pool, (one, other, *_) = library.plain.pool, await stored(library)
    first, second = json.loads(one["data"]), json.loads(other["data"])
    changed: Any = {
        "a changed remainder": first | {"plan": "max"},
        "a field in plain text": first | {"email": JANE["email"]},
        "a field removed": {k: v for k, v in first.items() if k != "email"},
        "fields swapped between paths": first | {"email": first["address"]["street"], "address": first["address"] | {"street": first["email"]}},
        "a field moved between events": first | {"email": second["email"]},
        "another event's document": second,
    }.get(how)
    if changed is not None:
        await pool.execute("UPDATE messages SET data = $1 WHERE stream_position = 1", orjson.dumps(changed))
    elif how == "the document removed":
        await pool.execute("UPDATE messages SET data = NULL WHERE stream_position = 1")
    elif how == "the envelope removed":
        await pool.execute("UPDATE messages SET data_encrypted = NULL WHERE stream_position = 1")
    elif how == "a document beside a tombstone":
        await pool.execute("UPDATE messages SET data = $1 WHERE stream_position = 3", one["data"])
    elif how == "another event's row":
        await pool.execute("UPDATE messages SET data = $1, data_encrypted = $2 WHERE stream_position = 1", other["data"], other["data_encrypted"])
    else:
        await pool.execute("UPDATE messages SET data = $1, data_encrypted = NULL, metadata = '{}' WHERE stream_position = 1", orjson.dumps(JANE))


@pytest.mark.parametrize(
    "how",
    [
        "a changed remainder", "a field in plain text", "a field removed", "fields swapped between paths", "a field moved between events",
        "another event's document", "the document removed", "the envelope removed", "a document beside a tombstone", "another event's row",
        "plaintext planted",
    ],
)  # fmt: skip
async def test_what_was_altered_is_detected_by_every_reader(library: Library, policy: str, how: str) -> None:
    await append(library, JANE, JANE | {"email": "joan@example.org"}, None)
    assert [isinstance(event, Event) for event in await all_of(library, 3)] == [True] * 3, "control"
    await tamper(library, how)
    with pytest.raises(AuthenticationFailed):
        await library.store.read_stream("person-1", tenant="acme")
    with pytest.raises(AuthenticationFailed):
        await library.store.aggregate_stream("person-1", lambda state, event: [*state, event], list[Any](), tenant="acme")
    found = [event for event in await all_of(library, 3) if isinstance(event, Unreadable)]
    assert [(type(event.error), event.position) for event in found] == [(AuthenticationFailed, 3 if "tombstone" in how else 1)]


async def test_policies_with_fields_are_validated(library: Library, policy: str) -> None:
    for bad in ({"fields": ["email"]}, {"fields": ["/a", "/a/b"]}, {"fields": ["/~7"]}, {"fields": ["/a"], "encrypt": False}, {"fields": [""]}):
        with pytest.raises(ConfigurationError):
            await library.policies.update_policy(policy, bad, actor="ann", reason="bad")
    found = await library.policies.get_policy(policy)
    assert found is not None
    assert (found.fields, found.version) == (FIELDS, 1)
    with pytest.raises(ConfigurationError):
        await append(library, {"email": 1}, stream="cart-1", encryption=EncryptionConfig(fields=["nonsense"]))


async def test_forms_stand_side_by_side_when_policy_changes_in_mid_stream(library: Library, policy: str) -> None:
    await library.policies.update_policy(policy, {"encrypt": False, "fields": []}, actor="ann", reason="1")
    await append(library, JANE)
    await library.policies.update_policy(policy, {"encrypt": True, "fields": list(FIELDS)}, actor="ann", reason="2")
    await append(library, JANE)
    await library.policies.update_policy(policy, {"fields": []}, actor="ann", reason="3")
    await append(library, JANE, b"no JSON")
    await library.policies.update_policy(policy, {"fields": ["/plan"], "algorithm": "ChaCha20-Poly1305"}, actor="ann", reason="4")
    await append(library, JANE)
    forms = [(row["data"] is not None, row["data_encrypted"] is not None) for row in await stored(library)]
    assert forms == [(True, False), (True, True), (False, True), (False, True), (True, True)]
    assert await read(library) == [JANE, JANE, JANE, b"no JSON", JANE]
    history = await library.policies.history(policy)
    assert [row["definition"]["fields"] for row in history] == [list(FIELDS), [], list(FIELDS), [], ["/plan"]]


async def test_an_override_seals_more_fields_than_policy_and_never_less(library: Library, policy: str) -> None:
    await append(library, JANE, encryption=EncryptionConfig(fields=[*FIELDS, "/plan"]))
    await append(library, JANE)
    await append(library, JANE, encryption=EncryptionConfig(fields=()))
    await append(library, JANE, stream="cart-1", encryption=EncryptionConfig(fields=["/email"]))
    for less in (["/email"], ["/plan"]):
        with pytest.raises(AccessDenied):
            await append(library, JANE, encryption=EncryptionConfig(fields=less))
    with pytest.raises(AccessDenied):
        await append(library, JANE, stream="user-1", encryption=EncryptionConfig(fields=["/email"]))
    cart, more, as_policy, whole = await stored(library)
    assert json.loads(cart["data"])["email"].startswith("ks1.")
    assert json.loads(cart["data"])["address"] == JANE["address"]
    assert json.loads(more["data"])["plan"].startswith("ks1.")
    assert json.loads(as_policy["data"])["plan"] == "pro"
    assert whole["data"] is None
    assert await read(library) == [JANE] * 3
    assert await read(library, "cart-1") == [JANE]


async def test_a_consumer_gets_the_documents_restored(library: Library, policy: str) -> None:

    await append(library, JANE, {})
    seen: list[Any] = []
    stop = asyncio.Event()

    async def handler(event: Event | Erased) -> None:
        seen.append(event.data if isinstance(event, Event) else event)
        if len(seen) == 2:
            stop.set()

    await asyncio.wait_for(library.consumer("c", tenant="acme").run(handler, stop), 120)
    assert seen == [JANE, {}]


async def test_seals_of_fields_count_as_uses_of_the_streams_key(library: Library, policy: str) -> None:
    for _ in range(3):
        await append(library, JANE, JANE)
    uses = await library.plain.pool.fetchval("SELECT uses_reserved FROM encryption_keys WHERE scope_kind = 'stream'")
    assert uses >= 3 * 2 * 6
    library.keys.forget_all()
    await append(library, JANE)
    assert await read(library) == [JANE] * 7
    await append(library, JANE, stream="user-1")
    of_whole = await library.plain.pool.fetchval("SELECT uses_reserved FROM encryption_keys WHERE scope_id = 'user-1'")
    assert of_whole == 0, "control: a whole event is counted by its position"


async def test_a_block_of_seals_that_is_larger_than_the_limits_stops_nobody(settings: Settings) -> None:
    """Of a key that is on record already: its whole events were counted by their positions, its fields are not."""
    limits = settings.limits.model_copy(update={"soft_uses": 30, "hard_uses": 40})
    async with open_library(settings.model_copy(update={"limits": limits}), writer="library-test") as library:
        made = await library.policies.create_policy(PolicySpec(stream_class="Person"), actor="ann", reason="a test")
        await append(library, JANE)
        await library.policies.update_policy(made.policy_id, {"fields": FIELDS}, actor="ann", reason="a test")
        for _ in range(12):
            await append(library, JANE)
        assert await read(library) == [JANE] * 13
        rows = await library.plain.pool.fetch("SELECT key_version, uses_reserved FROM encryption_keys WHERE scope_kind = 'stream' ORDER BY 1")
        assert [row["key_version"] for row in rows] == [1, 2, 3], "1 + 12 * 7 seals, 30 under one version"
        assert max(row["uses_reserved"] for row in rows) <= 40


async def test_over_another_store_documents_are_sealed_too(library: Library, policy: str) -> None:
    base = MemoryEventStore()
    store = create_crypto_event_store(base, keys=library.keys, policy=lambda stream, _type: "Person", build_aad=lambda context: b"bound")
    await store.append_to_stream("person-1", [NewEvent(type="T", data=JANE), NewEvent(type="T", data=None)], tenant="acme")
    [kept, _] = (await base.read_stream("person-1", tenant="acme")).events
    assert isinstance(kept, Event)
    assert kept.value is not None
    assert b"pro" in kept.value
    assert not any(secret.encode() in kept.value for secret in SECRETS)
    events = (await store.read_stream("person-1", tenant="acme")).events
    assert [event.data for event in events if isinstance(event, Event)] == [JANE, None]
    other = create_crypto_event_store(base, keys=library.keys, policy=lambda stream, _type: "Person")
    with pytest.raises(AuthenticationFailed):
        await other.read_stream("person-1", tenant="acme")


async def test_control_a_writer_that_ignores_the_policys_fields_is_seen(library: Library, policy: str) -> None:
    """The search for plaintext and the check of the form are shown red on events that were appended past the decorator."""
    await library.plain.append_to_stream("person-1", [NewEvent(type="T", data=JANE)], tenant="acme", stream_class="Person")
    assert await clear_of(library.plain.pool, SECRETS) == list(SECRETS)
    with pytest.raises(SidecarError):
        await append(library, 7)
