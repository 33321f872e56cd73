"""The library as an application uses it: services, policies, text, being forgotten; each against a real database and control plane."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

import sidecar
from sidecar import EncryptionConfig, Erased, Event, Library, NewEvent, PolicySpec
from sidecar.core.errors import (
    AccessDenied,
    AuthenticationFailed,
    ConfigurationError,
    Conflict,
    KeyShredded,
    MalformedEnvelope,
    RecordRefused,
    UnknownKey,
)
from sidecar.core.model import Scope, ScopeKind
from sidecar.sending import Sender
from sidecar.settings import Settings
from sidecar.steps import SystemClock
from sidecar.testing import control_plane as kit


def test_every_name_that_is_promised_can_be_imported() -> None:
    for name in sidecar.__all__:
        assert getattr(sidecar, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = sidecar.nonsense


async def test_a_class_that_policy_encrypts_is_sealed_and_one_that_it_does_not_is_plain(library: Library) -> None:
    for stream in ("user-1", "cart-1"):
        await library.store.append_to_stream(stream, [NewEvent(type="T", data={"email": "jane@example.org"}, metadata={"by": "jane"})], tenant="acme")
    rows = await library.plain.pool.fetch("SELECT stream_id, data, data_encrypted, metadata FROM messages ORDER BY stream_id")
    cart, user = rows
    assert (cart["data"], cart["data_encrypted"]) == (b'{"email":"jane@example.org"}', None)
    assert (user["data"], user["metadata"]) == (None, None)
    assert b"jane" not in user["data_encrypted"]
    for stream in ("user-1", "cart-1"):
        [event] = (await library.store.read_stream(stream, tenant="acme")).events
        assert isinstance(event, Event)
        assert (event.data, event.metadata["by"]) == ({"email": "jane@example.org"}, "jane")
    assert event.metadata.keys() == {"by"}


async def test_metadata_say_how_an_event_is_sealed_as_in_the_plan(library: Library) -> None:
    await library.store.append_to_stream("user-1", [NewEvent(type="T", data=1)], tenant="acme")
    [event] = (await library.store.read_stream("user-1", tenant="acme")).events
    key = await library.shredding.get_stream_key("user-1", "acme")
    assert isinstance(event, Event)
    enc = event.metadata["enc"]
    assert enc.keys() == {"algo", "keyId", "keyVersion", "iv", "aadHash"}
    assert (enc["algo"], enc["keyId"], enc["keyVersion"]) == ("AES-256-GCM", str(key.key_id), key.key_version)
    [unopened] = (await library.store.read_stream("user-1", tenant="acme", decryption=sidecar.DecryptionConfig(decrypt_data=False))).events
    assert isinstance(unopened, Event)
    assert unopened.data.startswith("ks1.")


async def test_text_comes_back_where_it_belongs_and_nowhere_else(library: Library) -> None:
    service = library.shredding
    for data in ({"a": [1, None]}, "text", b"\x00\xff", b"", None, 7):
        text = await service.encrypt_event_data(data, "user-1", "acme")
        assert text.startswith("ks1.")
        found = await service.decrypt_event_data(text, "user-1", "acme")
        assert (found, type(found)) == (data, type(data))
    text = await service.encrypt_event_data("secret", "user-1", "acme")
    with pytest.raises(AuthenticationFailed):
        await service.decrypt_event_data(text, "user-2", "acme")
    with pytest.raises(UnknownKey):
        await service.decrypt_event_data(text, "user-1", "globex")
    with pytest.raises(AuthenticationFailed):
        await service.decrypt_event_data(text[:-2] + ("AA" if text[-2:] != "AA" else "BA"), "user-1", "acme")
    with pytest.raises(MalformedEnvelope):
        await service.decrypt_event_data("ks1.nonsense", "user-1", "acme")


async def test_text_of_a_plain_stream_does_not_make_its_events_encrypted(library: Library) -> None:
    await library.shredding.encrypt_event_data("x", "cart-1", "acme")
    await library.store.append_to_stream("cart-1", [NewEvent(type="T", data="plain")], tenant="acme")
    assert await library.plain.pool.fetchval("SELECT data FROM messages") == b'"plain"'


async def test_a_rotated_key_opens_what_it_sealed_and_seals_nothing_more(library: Library) -> None:
    service = library.shredding
    old = await service.encrypt_event_data("old", "user-1", "acme")
    await library.store.append_to_stream("user-1", [NewEvent(type="T", data="old")], tenant="acme")
    first = await service.get_stream_key("user-1", "acme")
    await service.rotate_stream_key("user-1", "acme")
    with pytest.raises(UnknownKey):
        await service.get_stream_key("user-1", "acme")  # its successor is made at the next write
    await library.store.append_to_stream("user-1", [NewEvent(type="T", data="new")], tenant="acme")
    second = await service.get_stream_key("user-1", "acme")
    assert (second.key_id, second.key_version) == (first.key_id, first.key_version + 1)
    assert [e.data for e in (await library.store.read_stream("user-1", tenant="acme")).events if isinstance(e, Event)] == ["old", "new"]
    assert await service.decrypt_event_data(old, "user-1", "acme") == "old"


async def test_clean_up_spares_keys_that_text_outside_the_store_may_need(library: Library) -> None:
    service = library.shredding
    text = await service.encrypt_event_data("kept elsewhere", "user-1", "acme")
    await service.generate_stream_key("acme", "user-2")
    for stream in ("user-1", "user-2"):
        await service.rotate_stream_key(stream, "acme")
    assert await service.cleanup_old_keys(0, "acme") == 1
    assert await service.decrypt_event_data(text, "user-1", "acme") == "kept elsewhere"


async def test_an_override_may_ask_for_more_than_policy_and_never_for_less(library: Library) -> None:
    event = NewEvent(type="T", data="x")
    await library.store.append_to_stream("user-1", [event], tenant="acme")
    with pytest.raises(AccessDenied):
        await library.store.append_to_stream("user-1", [event], tenant="acme", encryption=EncryptionConfig(encrypt_stream=False))
    await library.store.append_to_stream("user-1", [event], tenant="acme", encryption=EncryptionConfig(algorithm="ChaCha20-Poly1305"))
    await library.store.append_to_stream("user-1", [event], tenant="acme")
    await library.store.append_to_stream("cart-1", [event], tenant="acme", encryption=EncryptionConfig())
    read = (await library.store.read_stream("user-1", tenant="acme")).events
    assert [e.metadata["enc"]["algo"] for e in read if isinstance(e, Event)] == ["AES-256-GCM", "ChaCha20-Poly1305", "AES-256-GCM"]
    assert await library.plain.pool.fetchval("SELECT count(*) FROM messages WHERE data_encrypted IS NULL") == 0


async def test_policies_are_validated_unique_versioned_and_live_at_once(library: Library) -> None:
    service = library.policies
    made = await service.create_policy(PolicySpec.model_validate({"class": "Person", "encrypt": False}), actor="ann", reason="not personal")
    await library.store.append_to_stream("person-1", [NewEvent(type="T", data="plain")], tenant="acme")
    with pytest.raises(Conflict):
        await service.create_policy(PolicySpec.model_validate({"class": "Person"}), actor="ann", reason="again")
    for bad in ({"algorithm": "ROT13"}, {"rotation_days": -1}, {"key_scope": "galaxy"}, {"class": "Other"}):
        with pytest.raises(ConfigurationError):
            await service.update_policy(made.policy_id, bad, actor="ann", reason="bad")
    updated = await service.update_policy(made.policy_id, {"encrypt": True, "algorithm": "ChaCha20-Poly1305"}, actor="bob", reason="it is personal")
    assert updated.version == 2
    await library.store.append_to_stream("person-1", [NewEvent(type="T", data="sealed")], tenant="acme")
    rows = await library.plain.pool.fetch("SELECT data, data_encrypted FROM messages ORDER BY stream_position")
    assert [(r["data"] is not None, r["data_encrypted"] is not None) for r in rows] == [(True, False), (False, True)]
    assert [e.data for e in (await library.store.read_stream("person-1", tenant="acme")).events if isinstance(e, Event)] == ["plain", "sealed"]
    assert await service.get_policy(made.policy_id) == updated
    assert await service.get_policy_for_stream("person-9", "acme") == updated
    assert updated in await service.list_policies("acme")
    assert await service.get_policies_for_stream_type("Person") == [updated]
    await service.delete_policy(made.policy_id, actor="ann", reason="gone")
    assert await service.get_policy(made.policy_id) is None
    history = await service.history(made.policy_id)
    assert [(h["actor"], h["reason"], h["deleted"]) for h in history] == [
        ("ann", "not personal", False), ("bob", "it is personal", False), ("ann", "gone", True),
    ]  # fmt: skip


async def test_what_is_forgotten_reads_as_erased_and_is_refused(library: Library, settings: Settings, tmp_path: Path) -> None:
    event = NewEvent(type="T", data="x")
    for stream in ("user-1", "user-2"):
        await library.store.append_to_stream(stream, [event, event], tenant="acme")
    text = await library.shredding.encrypt_event_data("secret", "user-1", "acme")
    assert await library.shredding.is_data_forgettable("acme", "user-1")
    with kit.control(tmp_path / "sidecar.yaml"):
        receipt = await library.shredding.forget_stream_data("user-1", "acme", reason="Art. 17 request")
        assert (receipt["status"], receipt["events"]["unreadable"]) == ("inaccessible", 2)
        read = await library.store.read_stream("user-1", tenant="acme")
        assert [type(e) for e in read.events] == [Erased, Erased]
        assert [e.data for e in (await library.store.read_stream("user-2", tenant="acme")).events if isinstance(e, Event)] == ["x", "x"]
        with pytest.raises(KeyShredded):
            await library.shredding.decrypt_event_data(text, "user-1", "acme")
        with pytest.raises(RecordRefused):
            await library.store.append_to_stream("user-1", [event], tenant="acme")
        with pytest.raises(sidecar.core.errors.StreamErased):
            await library.store.aggregate_stream("user-1", lambda n, _: n + 1, 0, tenant="acme")
        held, value = kit.command(settings, "hold", Scope.of_tenant("acme"))
        kit.send(settings, value)
        async with asyncio.timeout(120):
            while await library.plain.pool.fetchval("SELECT count(*) FROM receipts WHERE command_id = $1 AND status = 'done'", held) == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert not await library.shredding.is_data_forgettable("acme")
        with pytest.raises(AccessDenied):
            await library.shredding.forget_tenant_data("acme", reason="Art. 17 request")
        assert (await library.store.read_stream("user-2", tenant="acme")).version == 2


async def test_a_shred_of_the_class_reaches_text_of_a_stream_without_events_and_a_hold_on_the_stream_stands_in_its_way(
    library: Library, settings: Settings, tmp_path: Path
) -> None:
    service = library.shredding
    mine, others = [await service.encrypt_event_data("secret", stream, "acme") for stream in ("user-1", "cart-1")]
    await service.rotate_stream_key("user-1", "acme")
    later = await service.encrypt_event_data("later", "user-1", "acme")
    of_class = Scope(tenant="acme", kind=ScopeKind.CLASS, id=service._classify("user-1", ""))
    stream = Scope(tenant="acme", kind=ScopeKind.STREAM, id="user-1")

    async def carried_out(op: str, scope: Scope) -> dict[str, Any]:
        return await Sender(settings, SystemClock())(op, scope, "a test", {})

    with kit.control(tmp_path / "sidecar.yaml"):
        assert (await carried_out("hold", stream))["status"] == "done"
        assert (await carried_out("shred", of_class))["error"]["code"] == "legal_hold"
        assert await service.decrypt_event_data(mine, "user-1", "acme") == "secret"
        assert (await carried_out("release", stream))["status"] == "done"
        receipt = await carried_out("shred", of_class)
        assert (receipt["status"], receipt["keys"]["count"]) == ("inaccessible", 2)
        for text in (mine, later):
            with pytest.raises(KeyShredded):
                await service.decrypt_event_data(text, "user-1", "acme")
        with pytest.raises(RecordRefused):
            await service.encrypt_event_data("again", "user-1", "acme")
        assert await service.decrypt_event_data(others, "cart-1", "acme") == "secret"


async def test_a_key_is_destroyed_by_name_with_all_its_versions_and_a_tenants_by_the_tenant(library: Library, tmp_path: Path) -> None:
    event = NewEvent(type="T", data="x")
    for stream in ("user-1", "user-2"):
        await library.store.append_to_stream(stream, [event], tenant="acme")
    key = await library.shredding.get_stream_key("user-1", "acme")
    await library.shredding.rotate_stream_key("user-1", "acme")
    await library.store.append_to_stream("user-1", [event], tenant="acme")
    with kit.control(tmp_path / "sidecar.yaml"):
        with pytest.raises(UnknownKey):
            await library.keys.destroy("globex", key, reason="not its key")
        receipt = await library.keys.destroy("acme", key, reason="Art. 17 request")
        assert (receipt["status"], receipt["keys"]["count"], receipt["events"]["unreadable"]) == ("inaccessible", 2, 2)
        assert [type(e) for e in (await library.store.read_stream("user-2", tenant="acme")).events] == [Event]
        assert (await library.keys.destroy("acme", reason="the contract ended"))["status"] == "inaccessible"
        assert [type(e) for e in (await library.store.read_stream("user-2", tenant="acme")).events] == [Erased]


async def test_without_a_way_to_command_nothing_is_forgotten(library: Library) -> None:
    service = sidecar.CryptoShreddingService(library.keys, library.shredding._clock)
    with pytest.raises(AccessDenied):
        await service.forget_tenant_data("acme", reason="r")


async def test_the_key_of_another_scope_cannot_be_asked_for_by_name_alone(library: Library) -> None:
    await library.store.append_to_stream("user-1", [NewEvent(type="T", data="x")], tenant="acme")
    key = await library.keys.get_active_key("acme", Scope(tenant="acme", kind=ScopeKind.STREAM, id="user-1"))
    assert not any(isinstance(part, bytes | bytearray) for part in (key.key_id, key.key_version))
    with pytest.raises(UnknownKey):
        await library.keys.get_key("globex", key.key_id, key.key_version)
