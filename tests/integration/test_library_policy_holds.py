"""Nothing that an application says beside an event makes it less protected than policy wants it: another class, an override, a failed append before."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import ValidationError

from sidecar import AccessDenied, EncryptionConfig, Event, Library, MemoryEventStore, NewEvent, PolicySpec, create_crypto_event_store, open_library
from sidecar.core.envelope import parse_header
from sidecar.core.errors import MalformedRecord, RecordRefused
from sidecar.core.model import ScopeKind
from sidecar.settings import Settings

EVENT = NewEvent(type="T", data={"a": "secret", "b": 1}, subject="ann")


@pytest.fixture
async def refusing(settings: Settings) -> AsyncIterator[Library]:
    """Another process, which refuses what no policy names."""
    policies = settings.policies.model_copy(update={"unmatched": "refuse"})
    async with open_library(settings.model_copy(update={"policies": policies}), writer="library-other") as opened:
        yield opened


async def append(library: Library, stream: str, event: NewEvent = EVENT, **more: Any) -> None:
    await library.store.append_to_stream(stream, [event], tenant="acme", **more)


async def decide(library: Library, **policy: Any) -> None:
    await library.policies.create_policy(PolicySpec.model_validate(policy), actor="ann", reason="a test")


async def test_an_override_goes_by_the_streams_own_class_whatever_the_call_names(library: Library) -> None:
    await decide(library, **{"class": "Medical"})
    await decide(library, **{"class": "unclassified", "encrypt": False})
    await append(library, "m-1", stream_class="Medical")
    with pytest.raises(AccessDenied):
        await append(library, "m-1", encryption=EncryptionConfig(fields=["/b"]))
    await append(library, "m-1", encryption=EncryptionConfig(algorithm="ChaCha20-Poly1305"))
    assert await library.plain.pool.fetchval("SELECT count(*) FROM messages WHERE data IS NULL") == 2


async def test_an_override_leaves_an_event_under_its_persons_key(library: Library) -> None:
    await decide(library, **{"class": "Medical", "key_scope": "subject"})
    await append(library, "m-1", stream_class="Medical")
    await append(library, "m-1", encryption=EncryptionConfig(algorithm="ChaCha20-Poly1305"))
    rows = await library.plain.pool.fetch("SELECT data_encrypted FROM messages")
    assert [parse_header(bytes(row[0])).scope_kind for row in rows] == [ScopeKind.SUBJECT] * 2


async def test_an_override_does_not_store_what_policy_refuses(refusing: Library) -> None:
    with pytest.raises(RecordRefused):
        await append(refusing, "x-1", encryption=EncryptionConfig())


async def test_what_policy_refuses_by_now_is_refused_in_encrypted_streams_too(library: Library, refusing: Library) -> None:
    await decide(library, **{"class": "Note"})
    await append(library, "n-1", stream_class="Note")
    await append(refusing, "n-1")
    await library.policies.delete_policy("*/Note", actor="ann", reason="a test")
    with pytest.raises(RecordRefused):
        await append(refusing, "n-1")


async def test_the_class_that_an_append_named_in_vain_binds_no_later_one(library: Library) -> None:
    await decide(library, **{"class": "Bare", "encrypt": False})
    with pytest.raises(MalformedRecord):
        await append(library, "x-1", NewEvent(type="", data="x"), stream_class="Bare")
    with pytest.raises(RuntimeError):
        async with library.store.session() as session:
            await append(library, "x-2", stream_class="Bare", session=session)
            await append(library, "x-2", stream_class="UserPersonalData", session=session)  # by then the stream's class is fixed
            raise RuntimeError
    await append(library, "x-1", stream_class="UserPersonalData")
    async with library.store.session() as session:
        await append(library, "x-2", stream_class="UserPersonalData", session=session)
        await append(library, "x-2", session=session)
    rows = await library.plain.pool.fetch("SELECT stream_type_class, data IS NULL FROM messages JOIN streams USING (tenant_id, stream_id)")
    assert [tuple(row) for row in rows] == [("UserPersonalData", True)] * 3


async def test_a_stream_of_another_store_that_was_encrypted_once_stays_encrypted(library: Library) -> None:
    base = MemoryEventStore()
    await decide(library, **{"class": "Note"})
    for encrypt in (True, False):
        await library.policies.update_policy("*/Note", {"encrypt": encrypt}, actor="ann", reason="a test")
        library.keys.forget_all()  # or another process
        store = create_crypto_event_store(base, keys=library.keys)
        await store.append_to_stream("n-1", [EVENT], tenant="acme", stream_class="Note")
    with pytest.raises(AccessDenied):
        library.keys.forget_all()
        await store.append_to_stream("n-1", [EVENT], tenant="acme", stream_class="Note", encryption=EncryptionConfig(encrypt_stream=False))
    kept = (await base.read_stream("n-1", tenant="acme")).events
    assert [str(event.data)[:4] for event in kept if isinstance(event, Event)] == ["ks1."] * 2


async def test_an_applications_own_metadata_of_that_name_do_not_make_a_plain_event_unreadable(library: Library) -> None:
    for enc in (5, {"document": "x"}, {"algo": "mine"}):
        await append(library, "cart-1", NewEvent(type="T", data="ks1.x", metadata={"enc": enc}))
    read = await library.store.read_stream("cart-1", tenant="acme")
    assert [event.metadata["enc"] for event in read.events if isinstance(event, Event)] == [5, {"document": "x"}, {"algo": "mine"}]


async def test_the_person_whom_an_event_names_is_the_one_that_a_header_would_name(library: Library) -> None:
    """Whatever the header is called: from Kafka it comes with the record, here with the event."""
    await decide(library, **{"class": "Medical", "key_scope": "subject", "subject": "header:x-patient"})
    await append(library, "m-1", stream_class="Medical")
    assert [row[0] for row in await library.plain.pool.fetch("SELECT scope_id FROM encryption_keys")] == ["ann"]
    with pytest.raises(MalformedRecord):
        await append(library, "m-1", NewEvent(type="T", data="x"))


async def test_a_policy_of_a_tenant_that_cannot_be_is_none(library: Library) -> None:
    """A glob would look as if it protected somebody, and match nobody."""
    for tenant in ("acme-*", "acme ", "", "a/b"):
        with pytest.raises(ValidationError):
            PolicySpec.model_validate({"class": "Note", "tenant": tenant})
