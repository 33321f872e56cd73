"""Promise: what applications really send is taken as it is: any bytes, odd names, tombstones, forged headers, transactions, three formats.

Every case goes through an encrypted stream and a plain one, and must read the same from the store and in the view.
"""

import json
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import Producer

from sidecar.kafka.client import client_config
from sidecar.testing.local_stack import LocalStack
from tests.acceptance.world import Headers, World, world_on

JSON_SOURCE = {"format": "json", "tenant": "json:/who/tenant", "stream": "json:/who/id", "type": "const:Json", "id": None}


@pytest.fixture(scope="module")
def shared(local_stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One data plane for the module; each case has streams of its own."""
    name = f"json{secrets.token_hex(4)}"
    with world_on(local_stack, tmp_path_factory.mktemp("input"), extra_sources=[{"topic": name, **JSON_SOURCE}]) as world:
        world.json_topic = name  # type: ignore[attr-defined]
        world.run()
        yield world


def view_of(world: World, tenant: str, stream: str) -> list[Any]:
    """The view's records of one stream, in order."""
    found = [m for m in world.records(world.topic("view")) if dict(m.headers()).get("ce_streamid") == stream.encode()]
    return [m for m in found if dict(m.headers())["ce_tenantid"] == tenant.encode()]


def fresh_streams(world: World) -> list[str]:
    """An encrypted and a plain one."""
    return [f"{kind}-{secrets.token_hex(4)}" for kind in ("aes", "cart")]


def both_ways(world: World, values: list[bytes | None], headers: Headers = (), **more: Any) -> None:
    streams = fresh_streams(world)
    for stream in streams:
        for value in values:
            world.event(world.topic("in"), value, stream=stream, partition=0, headers=headers, **more)
    world.settle()
    for stream in streams:
        rows = world.events("acme", stream=stream)
        assert [(row["status"], row["value"], row["is_tombstone"]) for row in rows] == [("ok", value, value is None) for value in values]
        assert [m.value() for m in view_of(world, "acme", stream)] == values
    sealed = {row["is_encrypted"] for row in world.sql("SELECT is_encrypted FROM streams WHERE stream_id = ANY ($1)", streams)}
    assert sealed == {True, False}


def test_null_and_empty_values_are_two_different_things(shared: World) -> None:
    both_ways(shared, [b"first", None, b"", b"last", None])


@pytest.mark.parametrize(
    "value",
    [bytes(range(256)) * 4, b"\0", b"\xff\xfe", b"\\N", b"\x00" * 100_000, b"KS\x01\x01", b'{"a":1,"a":2,"n":1e400}', "😀 \u2028".encode()],
    ids=["every byte", "nul", "no UTF-8", "COPY's null", "zeros", "an envelope's magic", "odd JSON", "astral"],
)
def test_any_bytes_are_a_value(shared: World, value: bytes) -> None:
    both_ways(shared, [value])


def test_a_value_of_exactly_the_limit_is_accepted(shared: World) -> None:
    key = b"k"
    both_ways(shared, [secrets.token_bytes(2**20 - len(key))], key=key)


@pytest.mark.parametrize("key", [None, b"", b"\0\xff", b"x" * 10_000], ids=["none", "empty", "binary", "long"])
def test_any_key_is_kept(shared: World, key: bytes | None) -> None:
    streams = fresh_streams(shared)
    for stream in streams:
        shared.event(shared.topic("in"), b"v", stream=stream, key=key)
    shared.settle()
    for stream in streams:
        assert [row["status"] for row in shared.events("acme", stream=stream)] == ["ok"]
        assert [m.key() for m in view_of(shared, "acme", stream)] == [f"acme/{stream}/1".encode()]


def test_duplicate_headers_and_odd_ones_reach_the_view_in_order(shared: World) -> None:
    odd: Headers = [("x", b"1"), ("x", b"2"), ("X", b"3"), ("nul", b"a\0b"), ("none", None), ("empty", b""), ("\u00fc", b"\xff"), ("x", b"1")]
    streams = fresh_streams(shared)
    for stream in streams:
        shared.event(shared.topic("in"), b"v", stream=stream, headers=odd)
    shared.settle()
    for stream in streams:
        (record,) = view_of(shared, "acme", stream)
        assert [pair for pair in record.headers() if not pair[0].startswith("ce_")] == odd
        assert [row["status"] for row in shared.events("acme", stream=stream)] == ["ok"]


def test_the_last_of_a_duplicated_identity_header_counts_and_stands_once_in_the_view(shared: World) -> None:
    stream = f"aes-{secrets.token_hex(4)}"
    shared.event(shared.topic("in"), b"v", stream="aes-decoy", headers=[("ce_streamid", stream.encode()), ("ce_type", b"Last")])
    shared.settle()
    (record,) = view_of(shared, "acme", stream)
    assert [value for name, value in record.headers() if name == "ce_streamid"] == [stream.encode()]
    assert [(row["stream_id"], row["type"]) for row in shared.events("acme", stream=stream)] == [(stream, "Last")]


def test_forged_headers_of_ours_are_not_trusted_and_overwritten_on_output(shared: World) -> None:
    forged: Headers = [
        ("ce_streamposition", b"999"),
        ("ce_streamtype", b"CartData"),  # would be plain
        ("ce_sourcetopic", b"elsewhere"),
        ("ce_sourcepartition", b"77"),
        ("ce_sourceoffset", b"78"),
        ("ce_specversion", b"9"),
        ("reason", b"malformed"),
    ]
    stream = f"aes-{secrets.token_hex(4)}"
    shared.event(shared.topic("in"), b"v", stream=stream, headers=forged)
    shared.settle()
    (record,) = view_of(shared, "acme", stream)
    names = [name for name, _ in record.headers()]
    assert len(names) == len(set(names))
    found = dict(record.headers())
    source = shared.sql("SELECT source_partition, source_offset FROM messages WHERE stream_id = $1", stream)[0]
    assert found["ce_streamposition"] == b"1"
    assert found["ce_streamtype"] == b"Aes"
    assert found["ce_specversion"] == b"1.0"
    assert found["ce_sourcetopic"] == shared.topic("in").encode()
    assert (found["ce_sourcepartition"], found["ce_sourceoffset"]) == (b"%d" % source[0], b"%d" % source[1])
    assert found["reason"] == b"malformed"  # the application's own
    assert shared.value("SELECT data_encrypted IS NOT NULL FROM messages WHERE stream_id = $1", stream)


def test_the_applications_source_and_time_are_kept(shared: World) -> None:
    stream = f"aes-{secrets.token_hex(4)}"
    shared.event(shared.topic("in"), b"v", stream=stream, headers=[("ce_time", b"2020-02-29T12:00:00.5+01:00")])
    shared.settle()
    found = dict(view_of(shared, "acme", stream)[0].headers())
    assert (found["ce_source"], found["ce_time"]) == (b"/test", b"2020-02-29T12:00:00.5+01:00")
    assert shared.value("SELECT occurred_at::text FROM messages WHERE stream_id = $1", stream).startswith("2020-02-29 11:00:00.5")


@pytest.mark.parametrize(
    "moment",
    [
        b"0001-01-01T00:00:00+14:00",
        b"9999-12-31T23:59:59-14:00",
        b"9999-12-31T23:59:59.9999999Z",
        b"yesterday",
        b"2020-01-01T00:00:00",
        b"\xff",
        b"",
        b"2020-13-01T00:00:00Z",
    ],
)
def test_a_time_that_no_calendar_holds_does_no_harm(shared: World, moment: bytes) -> None:
    both_ways(shared, [b"v"], headers=[("ce_time", moment)])


@pytest.mark.parametrize("timestamp", [1, 2**62, 253_402_300_800_000])
def test_a_record_timestamp_of_any_number_does_no_harm(shared: World, timestamp: int) -> None:
    # a topic takes any CreateTime only when it is told to
    from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

    entries = [
        ConfigEntry(f"message.timestamp.{side}.max.ms", str(2**63 - 1), incremental_operation=AlterConfigOpType.SET) for side in ("before", "after")
    ]
    resource = ConfigResource(ResourceType.TOPIC, shared.topic("in"), incremental_configs=entries)
    admin = AdminClient(client_config(shared.settings))
    admin.incremental_alter_configs([resource])[resource].result(10)
    both_ways(shared, [b"v"], timestamp=timestamp)


@pytest.mark.parametrize(
    "name", ["a_b", "a-b", "a%", "jane@acme.com", "x::y", "a b", "ab", "a/b", "'; DROP TABLE messages --", "ü" * 127, "..", "\\N", "null"]
)
def test_stream_names_are_taken_as_they_come_and_never_merged(shared: World, name: str) -> None:
    tenant = f"t{secrets.token_hex(4)}"
    near = [name, f"{name}x", "aXb", "a__", name.upper() if name.upper() != name else f"{name}y"]
    for stream in near:
        shared.event(shared.topic("in"), stream.encode(), tenant=tenant, stream=stream)
    shared.settle()
    rows = shared.events(tenant)
    assert sorted((row["stream_id"], row["value"].decode(), row["position"]) for row in rows) == sorted((stream, stream, 1) for stream in near)
    assert [row["value"].decode() for row in shared.events(tenant, stream=name)] == [name]
    assert [m.value().decode() for m in view_of(shared, tenant, name)] == [name]


def test_a_topic_written_with_transactions_gives_the_committed_records_without_gaps(shared: World) -> None:
    stream = f"aes-{secrets.token_hex(4)}"
    producer = Producer(client_config(shared.settings, **{"transactional.id": secrets.token_hex(8), "linger.ms": 0}))
    producer.init_transactions(20)
    headers = [("ce_id", b"i"), ("ce_type", b"T"), ("ce_tenantid", b"acme"), ("ce_streamid", stream.encode())]
    for n in range(20):
        producer.begin_transaction()
        for part in range(3):
            kept = shared.delivered if n % 3 != 1 else None
            producer.produce(shared.topic("in"), b"%d.%d" % (n, part), partition=1, headers=headers, on_delivery=kept)
        producer.flush(60)
        if n % 3 == 1:
            producer.abort_transaction(20)
        else:
            producer.commit_transaction(20)
    shared.settle()
    wanted = [b"%d.%d" % (n, part) for n in range(20) if n % 3 != 1 for part in range(3)]
    rows = shared.events("acme", stream=stream)
    assert [(row["position"], row["value"]) for row in rows] == list(enumerate(wanted, start=1))
    assert [m.value() for m in view_of(shared, "acme", stream)] == wanted


def test_cloudevents_in_structured_mode_name_themselves_in_the_document(shared: World) -> None:
    stream = f"aes-{secrets.token_hex(4)}"
    document = {
        "specversion": "1.0",
        "id": "e-1",
        "type": "Made",
        "source": "/app",
        "tenantid": "acme",
        "streamid": stream,
        "data": {"b": 1, "a": [2]},
    }
    value = json.dumps(document, indent=3).encode()
    # headers that disagree do not count in this mode
    headers = [("content-type", b"application/cloudevents+json; charset=utf-8"), ("ce_tenantid", b"globex"), ("ce_streamid", b"other")]
    shared.send(shared.topic("in"), value, headers)
    shared.settle()
    (row,) = shared.events("acme", stream=stream)
    assert (row["message_id"], row["type"], row["value"]) == ("e-1", "Made", value)
    (record,) = view_of(shared, "acme", stream)
    assert record.value() == value
    assert dict(record.headers())["content-type"] == headers[0][1]


def test_plain_json_names_itself_by_pointers_and_is_stored_to_the_byte(shared: World) -> None:
    topic = shared.json_topic  # type: ignore[attr-defined]
    stream = f"aes-{secrets.token_hex(4)}"
    value = b' {"who": {"tenant": "acme", "id": "%s"}, "n": 12345678901234567890123, "n": 1.10, "x": "\\u00fc"}\n' % stream.encode()
    shared.send(topic, value, [])
    shared.send(topic, b'{"who": {"tenant": "acme", "id": 42}}', [])
    shared.settle()
    (row,) = shared.events("acme", stream=stream)
    assert (row["type"], row["value"]) == ("Json", value)
    source = shared.sql("SELECT source_partition, source_offset FROM messages WHERE stream_id = $1", stream)[0]
    assert row["message_id"] == f"{topic}/{source[0]}/{source[1]}"
    assert [m.value() for m in view_of(shared, "acme", stream)] == [value]
    assert [row["value"] for row in shared.events("acme", stream="42")] == [b'{"who": {"tenant": "acme", "id": 42}}']
