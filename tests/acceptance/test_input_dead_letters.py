"""Promise: what cannot be an event becomes a dead letter with its reason, and the topic moves on; its value stands nowhere in clear."""

import secrets
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any

import pytest

from sidecar.core.aead import Cipher
from sidecar.core.envelope import PREFIX_BYTES, dead_letter_aad, open_envelope, parse_header
from sidecar.keys import KeyManagement, dek_row, kek_row, open_dek
from sidecar.kms import open_for
from sidecar.testing.local_stack import LocalStack
from tests.acceptance.world import Headers, World, blocking, world_on


@pytest.fixture(scope="module")
def shared(local_stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    name = f"json{secrets.token_hex(4)}"
    sources = [
        {"topic": name, "format": "json", "tenant": "json:/tenant", "stream": "json:/stream", "type": "const:Json", "id": None},
        {"topic": f"{name}.pinned", "tenants": ["acme", "dev-*"]},
    ]
    with world_on(local_stack, tmp_path_factory.mktemp("dead"), extra_sources=sources) as world:
        world.json_topic = name  # type: ignore[attr-defined]
        world.run()
        yield world


def identity(**changes: bytes | None) -> Headers:
    names = {"ce_id": b"i", "ce_type": b"T", "ce_tenantid": b"acme", "ce_streamid": b"aes-dead"} | changes
    return [(name, value) for name, value in names.items() if value is not None]


def dead(world: World, topic: str, value: bytes | None, headers: Headers, reason: str, **more: Any) -> Any:
    """Send a bad record with a good one behind it, on one partition; -> the bad one's row."""
    stream = f"aes-{secrets.token_hex(4)}"
    before = world.sent.get((topic, 0), 0)
    world.send(topic, value, headers, partition=0, **more)
    good: Headers = identity(ce_streamid=stream.encode())
    world.send(topic, b'{"tenant": "acme", "stream": "%s"}' % stream.encode(), good, partition=0)
    world.settle()
    at = world.sent[topic, 0] - 2
    assert at >= before
    assert [row["status"] for row in world.events("acme", stream=stream)] == ["ok"]  # the topic moved on
    (row,) = world.sql(
        """SELECT d.* FROM dead_letters d JOIN source_topics t USING (source_id) WHERE topic = $1 AND partition = 0 AND "offset" = $2""", topic, at
    )
    assert row["reason"] == reason
    assert bytes(row["value_sha256"]) == sha256(value or b"").digest()
    assert world.dead_letters()[topic, 0, at] == reason
    stored = world.value(
        "SELECT count(*) FROM messages JOIN source_topics USING (source_id) WHERE topic = $1 AND source_partition = 0 AND source_offset = $2",
        topic,
        at,
    )
    assert stored == 0
    return row


@pytest.mark.parametrize("tenant", [None, b""], ids=["absent", "empty"])
def test_without_a_tenant_there_is_a_digest_and_no_value(shared: World, tenant: bytes | None) -> None:
    row = dead(shared, shared.topic("in"), b"secret", identity(ce_tenantid=tenant), "no_tenant")
    assert (row["tenant_id"], row["value_encrypted"]) == (None, None)


@pytest.mark.parametrize(
    "tenant",
    [
        b"../",
        b"..",
        b"a\0b",
        b"acme\n",
        b"\nacme",
        b"a" * 10_000,
        b"a" * 101,
        "ａｃｍｅ".encode(),
        "é".encode(),
        b"\xff",
        b"a/b",
        b" acme",
        b"acme ",
        b"-a",
        b"*",
    ],
    ids=[
        "dot dot slash",
        "dots",
        "nul",
        "newline",
        "newline first",
        "10,000",
        "101",
        "fullwidth",
        "accent",
        "no UTF-8",
        "slash",
        "space",
        "trailing space",
        "dash",
        "star",
    ],
)
def test_a_bad_tenant_id_is_never_normalised(shared: World, tenant: bytes) -> None:
    tenants = shared.value("SELECT count(*) FROM tenants")
    row = dead(shared, shared.topic("in"), b"secret", identity(ce_tenantid=tenant), "bad_tenant")
    assert (row["tenant_id"], row["value_encrypted"]) == (None, None)
    assert shared.value("SELECT count(*) FROM tenants") <= max(tenants, 1)  # the good record's


@pytest.mark.parametrize(
    "stream", [None, b"", b"a\0", b"a\nb", b"\x1b[2J", b"a" * 256, "ü".encode() * 128, b"\xff", "a\u202eb".encode(), "a\u00a0b".encode()],
    ids=["absent", "empty", "nul", "newline", "escape", "256", "256 in bytes", "no UTF-8", "bidi", "no-break space"],
)  # fmt: skip
def test_a_bad_stream_id_is_sealed_under_its_tenants_key(shared: World, stream: bytes | None) -> None:
    shared.event(shared.topic("in"), b"v", stream="aes-first")  # the tenant is known
    row = dead(shared, shared.topic("in"), b"secret", identity(ce_streamid=stream), "bad_stream")
    assert row["tenant_id"] == "acme"
    assert opened(shared, row) == b"secret"


@pytest.mark.parametrize("header", ["ce_id", "ce_type"])
@pytest.mark.parametrize("value", [None, b"", b"\n", b"x" * 256, b"\xff"], ids=["absent", "empty", "newline", "long", "no UTF-8"])
def test_a_bad_id_or_type_is_malformed(shared: World, header: str, value: bytes | None) -> None:
    dead(shared, shared.topic("in"), b"v", identity(**{header: value}), "malformed")


@pytest.mark.parametrize(
    "value",
    [
        b"",
        None,
        b"{",
        b'{"tenant": "acme"',
        b"\xff",
        b'{"tenant": "acme", "stream": "s"} x',
        b"[" * 100_000,
        b'{"tenant": "\\ud800", "stream": "s"}',
        b"nul",
    ],
    ids=["empty", "null", "brace", "cut", "no UTF-8", "two documents", "deep", "lone surrogate", "word"],
)
def test_malformed_json_is_a_dead_letter_where_a_pointer_needs_it(shared: World, value: bytes | None) -> None:
    dead(shared, shared.json_topic, value, [], "malformed")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "value", [b"{}", b"[]", b"1", b'"acme"', b'{"tenant": null}', b'{"tenant": {"a": 1}}', b'{"tenant": true}', b'{"tenant": 1.5}', b'{"tenant": ""}']
)
def test_json_that_points_at_nothing_names_no_tenant(shared: World, value: bytes) -> None:
    dead(shared, shared.json_topic, value, [], "no_tenant")  # type: ignore[attr-defined]


def test_a_structured_cloudevent_that_is_no_json_is_malformed_and_its_headers_do_not_help(shared: World) -> None:
    headers = [("content-type", b"application/cloudevents+json"), *identity()]
    dead(shared, shared.topic("in"), b"no json", headers, "malformed")


def test_a_topic_speaks_only_for_the_tenants_that_it_was_given(shared: World) -> None:
    topic = f"{shared.json_topic}.pinned"  # type: ignore[attr-defined]
    shared.event(topic, b"v", tenant="dev-7", stream="aes-1", partition=0)
    dead(shared, topic, b"secret", identity(ce_tenantid=b"globex"), "bad_tenant")
    assert len(shared.events("dev-7")) == 1
    assert shared.events("globex") == []


def test_a_record_over_the_limit_is_sealed_and_not_projected(shared: World) -> None:
    shared.event(shared.topic("in"), b"v", stream="aes-dead", partition=0)
    shared.settle()
    value = secrets.token_bytes(2**20 + 1)
    row = dead(shared, shared.topic("in"), value, identity(), "too_large")
    assert opened(shared, row) == value


@pytest.mark.parametrize(
    ("stream", "scope"),
    [
        ("aes-dl", ("stream", "aes-dl")),
        ("class-dl", ("class", "PerClass")),
        ("tenant-dl", ("tenant", "acme")),
        ("cart-dl", None),
        ("aes-never-seen", None),
    ],
)
def test_a_dead_letter_of_a_known_stream_is_sealed_as_the_stream_is_or_keeps_no_value(
    shared: World, stream: str, scope: tuple[str, str] | None
) -> None:
    if stream != "aes-never-seen":
        shared.event(shared.topic("in"), b"v", stream=stream, partition=0)
        shared.settle()
    row = dead(shared, shared.topic("in"), b"secret", identity(ce_streamid=stream.encode(), ce_id=b"\n"), "malformed")
    if scope is None:
        assert row["value_encrypted"] is None
    else:
        assert opened(shared, row) == b"secret"
        key = parse_header(bytes(row["value_encrypted"]))
        (found,) = shared.sql("SELECT scope_kind, scope_id FROM encryption_keys WHERE (key_id, key_version) = ($1, $2)", key.key_id, key.key_version)
        assert (tuple(found), key.scope_kind.value) == (scope, scope[0])


def test_ten_thousand_headers_are_too_many(shared: World) -> None:
    row = dead(shared, shared.topic("in"), b"v", [*identity(), *[(f"h{n}", b"x") for n in range(10_000)]], "too_many_headers")
    assert row["value_encrypted"] is None


def test_headers_that_make_the_view_record_too_large_leave_the_event_stored(shared: World) -> None:
    stream = f"aes-{secrets.token_hex(4)}"
    shared.event(shared.topic("in"), secrets.token_bytes(2**20 - 1000), stream=stream, key=b"k", headers=[(f"h{n}", b"x" * 2000) for n in range(100)])
    shared.event(shared.topic("in"), b"next", stream=stream, key=b"k")
    shared.settle()
    assert [row["status"] for row in shared.events("acme", stream=stream)] == ["ok", "ok"]
    viewed = [m.value() for m in shared.records(shared.topic("view")) if dict(m.headers())["ce_streamid"] == stream.encode()]
    assert viewed == [b"next"]
    assert list(shared.dead_letters().values()).count("view_too_large") == 1
    assert shared.value("SELECT count(*) FROM dead_letters WHERE reason = 'view_too_large'") == 1


def test_a_header_name_that_is_no_utf8_does_not_stop_the_topic(shared: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """No client of ours writes one, others can."""
    from aiokafka import AIOKafkaProducer
    from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy

    for user in ("producer", "message_accumulator"):
        monkeypatch.setattr(f"aiokafka.producer.{user}.DefaultRecordBatchBuilder", _DefaultRecordBatchBuilderPy)

    class Raw(str):
        def encode(self, *_: object) -> bytes:  # type: ignore[override]
            return b"\xff\xfe"

    stream = f"aes-{secrets.token_hex(4)}"

    async def send() -> None:
        producer = AIOKafkaProducer(bootstrap_servers=shared.stack.bootstrap_servers)
        await producer.start()
        try:
            await producer.send_and_wait(shared.topic("in"), b"v", partition=0, headers=[*identity(), (Raw("raw"), b"x")])
        finally:
            await producer.stop()

    before = shared.value("SELECT count(*) FROM dead_letters WHERE reason = 'malformed'")
    blocking(send)
    shared.event(shared.topic("in"), b"next", stream=stream, partition=0)
    shared.settle()
    assert [row["value"] for row in shared.events("acme", stream=stream)] == [b"next"]
    assert shared.value("SELECT count(*) FROM dead_letters WHERE reason = 'malformed'") == before + 1


def test_a_ten_megabyte_value_goes_through_with_the_limits_raised(make_world: Callable[..., World]) -> None:
    world = make_world(limits={"max_record_bytes": "11MiB"}, batch={"max_bytes": "32MiB"})
    value = secrets.token_bytes(10 * 2**20)
    for stream in ("aes-big", "cart-big"):
        world.event(world.topic("in"), value, stream=stream, partition=0)
    world.run()
    world.settle()
    for stream in ("aes-big", "cart-big"):
        (row,) = world.events("acme", stream=stream)
        assert row["value"] == value
    assert [m.value() == value for m in world.records(world.topic("view"))] == [True, True]


def opened(world: World, row: Any) -> bytes:
    """The sealed value of a dead letter."""
    sealed = bytes(row["value_encrypted"])
    header = parse_header(sealed)
    dek = world.sql("SELECT * FROM encryption_keys WHERE key_id = $1 AND key_version = $2", header.key_id, header.key_version)[0]
    kek = world.sql("SELECT * FROM tenant_keys WHERE tenant_id = $1", row["tenant_id"])[0]

    async def cipher() -> Cipher:
        keys = KeyManagement(open_for(world.settings.kms, "reader"))
        opened_kek = await keys.open_kek(kek_row(kek))
        return open_dek({kek["kek_version"]: opened_kek}, dek_row(dek)).into_cipher(header.suite)

    aad = dead_letter_aad(row["tenant_id"], row["source_id"], row["partition"], row["offset"], sealed[:PREFIX_BYTES])
    return open_envelope(blocking(cipher), sealed, aad)
