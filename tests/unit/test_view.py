"""Frames, attributes, view headers, keys and partitions."""

import re
from datetime import UTC, datetime
from zlib import crc32

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core import view
from sidecar.core.errors import MalformedEnvelope
from sidecar.core.extract import occurred_at
from tests.unit import independent_decoder as second
from tests.unit.samples import identifiers, kafka_headers, tenants

NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
"""The escape, not a text that reads like it behind an escaped backslash."""
Pairs = list[tuple[str, bytes | None]]
timestamps = st.integers(-(2**63), 2**63 - 1)
values = st.none() | st.binary(max_size=200)


@given(values, timestamps, kafka_headers, st.booleans())
def test_attributes_come_back_whatever_bytes_they_hold(key: bytes | None, timestamp: int, headers: Pairs, dead: bool) -> None:
    raw = view.attributes(key, timestamp, headers, dead)
    assert view.parse_attributes(raw)[:5] == (key, timestamp, headers, dead, None)
    assert not NUL.search(raw), "JSONB cannot hold NUL"
    doc, _ = second.unframe(view.frame(raw, b""))
    assert second.attribute_bytes(doc["key"]) == key
    found = [(second.attribute_bytes(name), second.attribute_bytes(value)) for name, value in doc.get("headers", [])]
    assert found == [(name.encode(), value) for name, value in headers]
    assert (doc["timestamp"], doc.get("tombstone", False)) == (timestamp, dead)


@given(values, st.sampled_from(sorted(view.OWN_HEADERS)), values)
def test_headers_under_our_names_are_never_kept(key: bytes | None, name: str, value: bytes | None) -> None:
    carried = view.parse_attributes(view.attributes(key, 0, [(name, value), ("own", b"1")], False))
    assert carried.headers == [("own", b"1")]


@given(st.binary(max_size=100), values)
def test_frame_comes_apart_where_it_was_put_together(attributes: bytes, value: bytes | None) -> None:
    assert view.unframe(view.frame(attributes, value)) == (attributes, value or b"")


@given(st.binary(max_size=60))
def test_arbitrary_frames_come_apart_whole_or_are_malformed(raw: bytes) -> None:
    try:
        attributes, value = view.unframe(raw)
    except MalformedEnvelope:
        return
    assert view.frame(attributes, value) == raw


def test_frame_cut_inside_its_attributes_is_malformed() -> None:
    whole = view.frame(b'{"key":null}', b"value")
    for length in range(4 + 12):
        with pytest.raises(MalformedEnvelope):
            view.unframe(whole[:length])


@given(kafka_headers, st.integers(0, 4 * 10**12), identifiers, identifiers, tenants, identifiers, st.integers(1, 2**63))
def test_view_headers_are_ours_whatever_a_producer_forged(
    headers: Pairs, timestamp: int, message_id: str, type_: str, tenant: str, stream: str, position: int
) -> None:
    forged = [(name, b"forged") for name in view.OWN_HEADERS]
    out = view.view_headers(
        [*headers, *forged],
        timestamp,
        message_id=message_id.encode(),
        type_=type_.encode(),
        tenant=tenant.encode(),
        stream=stream.encode(),
        stream_class=b"AuditLog",
        position=position,
        source=(b"users", 3, 42),
    )
    ours = {name: value for name, value in out if name in view.OWN_HEADERS}
    assert ours == {
        "ce_specversion": b"1.0",
        "ce_id": message_id.encode(),
        "ce_type": type_.encode(),
        "ce_tenantid": tenant.encode(),
        "ce_streamid": stream.encode(),
        "ce_streamtype": b"AuditLog",
        "ce_streamposition": str(position).encode(),
        "ce_sourcetopic": b"users",
        "ce_sourcepartition": b"3",
        "ce_sourceoffset": b"42",
    }
    names = [name for name, _ in out]
    assert all(names.count(name) == 1 for name in view.OWN_HEADERS)
    assert out[: len(headers)] == headers
    assert {"ce_source", "ce_time"} <= set(names)


def test_applications_own_source_and_time_are_kept() -> None:
    own = [("ce_source", b"/shop"), ("ce_time", b"2026-11-23T12:00:00Z")]
    out = view.view_headers(own, 0, message_id=b"m", type_=b"t", tenant=b"a", stream=b"s", stream_class=b"c", position=1, source=None)
    assert [pair for pair in out if pair[0] in ("ce_source", "ce_time")] == own
    assert not [name for name, _ in out if name.startswith("ce_source") and name != "ce_source"]


@given(st.integers(0, view.LAST_MS))
def test_time_is_rfc3339_to_the_millisecond(timestamp: int) -> None:
    moment = datetime.fromisoformat(view.rfc3339(timestamp).decode())
    assert moment == datetime.fromtimestamp(timestamp // 1000, UTC).replace(microsecond=timestamp % 1000 * 1000)


@given(timestamps)
def test_no_timestamp_that_a_producer_can_write_stops_the_projection(timestamp: int) -> None:
    assert len(view.rfc3339(timestamp)) == len("1970-01-01T00:00:00.000Z")
    assert datetime(1970, 1, 1, tzinfo=UTC).timestamp() * 1e6 <= occurred_at({}, timestamp) <= view.LAST_MS * 1000


@given(tenants, identifiers, st.integers(1, 2**40), st.none() | st.binary(max_size=9))
def test_view_keys_by_mode(tenant: str, stream: str, position: int, source_key: bytes | None) -> None:
    assert view.view_key("event", f"{tenant}/{stream}", position, source_key) == f"{tenant}/{stream}/{position}".encode()
    assert view.view_key("stream", f"{tenant}/{stream}", position, source_key) == f"{tenant}/{stream}".encode()
    assert view.view_key("source", f"{tenant}/{stream}", position, source_key) == source_key


@given(tenants, identifiers, tenants, identifiers)
def test_event_keys_of_two_streams_never_meet(tenant: str, stream: str, other: str, place: str) -> None:
    same = view.view_key("stream", f"{tenant}/{stream}", 1, None) == view.view_key("stream", f"{other}/{place}", 1, None)
    assert same == ((tenant, stream) == (other, place))


@given(tenants, identifiers, st.integers(1, 1000))
def test_partition_is_a_checksum_so_every_process_finds_the_same(tenant: str, stream: str, partitions: int) -> None:
    assert view.view_partition(f"{tenant}/{stream}", partitions) == crc32(f"{tenant}/{stream}".encode()) % partitions
    assert 0 <= view.guard_stripe(tenant) < 256


def test_partitions_and_stripes_of_a_release_are_those_of_the_next() -> None:
    assert [view.view_partition(f"acme/s-{n}", 6) for n in range(8)] == [crc32(b"acme/s-%d" % n) % 6 for n in range(8)]
    assert (view.guard_stripe("acme"), view.guard_stripe("globex")) == (crc32(b"acme") % 256, crc32(b"globex") % 256)


def test_metadata_of_plain_events_reads_from_jsonb_as_from_bytes() -> None:
    raw = view.attributes(b"\xff", 7, [("h", None)], True)
    assert view.parse_attributes(orjson.loads(raw)) == view.parse_attributes(raw)


@given(st.booleans(), identifiers, values)
def test_a_persons_header_is_ours_where_a_policy_names_the_person(known: bool, subject: str, producers: bytes | None) -> None:
    """Elsewhere it is the application's own, and kept."""
    carried = view.parse_attributes(view.attributes(None, 0, [("ce_subjectid", producers)], False, subject if known else None))
    assert carried.subject == (subject if known else None)
    headers = view.view_headers(
        carried.headers, 0, message_id=b"m", type_=b"t", tenant=b"a", stream=b"s", stream_class=b"c", position=1, source=None,
        subject=None if carried.subject is None else carried.subject.encode(),
    )  # fmt: skip
    assert [value for name, value in headers if name == "ce_subjectid"] == [subject.encode() if known else producers]
