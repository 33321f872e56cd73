"""Promise: bytes that were moved, swapped, truncated, altered or planted in Postgres are detected at read and on a replay; never shown as an event."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.acceptance.world import World

# The payload alone moves: the row says one thing, what was sealed says another.
SWAP = """UPDATE messages m SET data_encrypted = o.data_encrypted FROM messages o
WHERE (m.tenant_id, m.stream_id, m.stream_position) = ('acme', 'aes-1', 1) AND (o.tenant_id, o.stream_id, o.stream_position) = ('{}', '{}', {})"""
ROW = "WHERE (tenant_id, stream_id, stream_position) = ('acme', 'aes-1', 1)"
WRAP = """UPDATE encryption_keys k SET {} FROM encryption_keys o
WHERE (k.tenant_id, k.scope_id) = ('acme', 'aes-1') AND (o.tenant_id, o.scope_id) = ('{}', '{}')"""

TAMPERED = {
    "ciphertext of another stream": SWAP.format("acme", "aes-2", 1),
    "ciphertext of another tenant": SWAP.format("globex", "aes-1", 1),
    "ciphertext of another position": SWAP.format("acme", "aes-1", 2),
    "another type": f"UPDATE messages SET message_type = 'Other' {ROW}",
    "another message id": f"UPDATE messages SET message_id = 'other' {ROW}",
    "another schema version": f"UPDATE messages SET schema_version = 2 {ROW}",
    "another stream's name": f"UPDATE messages SET stream_id = 'aes-2', stream_position = 99 {ROW}",
    "another position": f"UPDATE messages SET stream_position = 99 {ROW}",
    "a tombstone now": f"UPDATE messages SET is_tombstone = true {ROW}",
    "a bit of the tag": f"UPDATE messages SET data_encrypted = set_bit(data_encrypted, octet_length(data_encrypted) * 8 - 1, 1 - get_bit(data_encrypted, octet_length(data_encrypted) * 8 - 1)) {ROW}",
    "truncated": f"UPDATE messages SET data_encrypted = substr(data_encrypted, 1, octet_length(data_encrypted) - 1) {ROW}",
    "cut to the header": f"UPDATE messages SET data_encrypted = substr(data_encrypted, 1, 37) {ROW}",
    "empty": f"UPDATE messages SET data_encrypted = '' {ROW}",
    "plaintext for ciphertext": f"UPDATE messages SET data_encrypted = 'planted' {ROW}",
    "plaintext planted": f"UPDATE messages SET data_encrypted = NULL, data = 'planted', metadata = '{{}}' {ROW}",
    "a tombstone planted": f"UPDATE messages SET data_encrypted = NULL, data = NULL, is_tombstone = true {ROW}",
    "plaintext planted, and nothing known of the stream": f"WITH gone AS (DELETE FROM streams WHERE (tenant_id, stream_id) = ('acme', 'aes-1')) UPDATE messages SET data_encrypted = NULL, data = 'planted', metadata = '{{}}' {ROW}",
    "the wrap of another stream": WRAP.format("key_material = o.key_material", "acme", "aes-2"),
    "the wrap and commitment of another stream": WRAP.format("key_material = o.key_material, commitment = o.commitment", "acme", "aes-2"),
    "the wrap of another tenant": WRAP.format("key_material = o.key_material, commitment = o.commitment", "globex", "aes-1"),
    "a commitment of another key": WRAP.format("commitment = o.commitment", "acme", "aes-2"),
    "a byte of the wrap": "UPDATE encryption_keys SET key_material = set_byte(key_material, 20, 255 - get_byte(key_material, 20)) WHERE (tenant_id, scope_id) = ('acme', 'aes-1')",
}  # fmt: skip
FLIPPED = {
    f"header byte {n}": f"UPDATE messages SET data_encrypted = set_byte(data_encrypted, {n}, 255 - get_byte(data_encrypted, {n})) {ROW}"
    for n in range(38)
}


@pytest.fixture
def stored(world: World) -> World:
    world.run()
    for tenant, stream in (("acme", "aes-1"), ("acme", "aes-2"), ("globex", "aes-1")):
        for n in range(2):
            world.event(world.topic("in"), b"%s %s %d" % (tenant.encode(), stream.encode(), n), tenant=tenant, stream=stream)
    world.settle()
    return world


def read(world: World) -> dict[tuple[str, str, int], tuple[str, bytes | None]]:
    return {(r["tenant_id"], r["stream_id"], r["position"]): (r["status"], r["value"]) for t in ("acme", "globex") for r in world.events(t)}


def test_whatever_was_done_to_a_row_or_its_key_reads_as_an_error_and_the_others_read_on(stored: World) -> None:
    before = read(stored)
    assert {status for status, _ in before.values()} == {"ok"}
    stored.sql("CREATE TABLE saved AS SELECT * FROM messages")
    stored.sql("CREATE TABLE saved_streams AS SELECT * FROM streams")
    stored.sql("CREATE TABLE saved_keys AS SELECT * FROM encryption_keys")
    undetected: dict[str, Any] = {}
    for name, statement in (TAMPERED | FLIPPED).items():
        stored.sql(statement)
        after = read(stored)
        changed = {at: held for at, held in after.items() if held != before.get(at)}
        of_key = "wrap" in name or "commitment" in name or "of the stream" in name
        # both of the stream's events hang on its key; of a row, only its own
        if len(changed) != (2 if of_key else 1) or {status for status, _ in changed.values()} != {"error"}:
            undetected[name] = changed
        assert not any(value == b"planted" for _, value in after.values())
        stored.sql("TRUNCATE messages")
        stored.sql("INSERT INTO messages OVERRIDING SYSTEM VALUE SELECT * FROM saved")
        stored.sql("INSERT INTO streams SELECT * FROM saved_streams ON CONFLICT DO NOTHING")
        stored.sql("TRUNCATE encryption_keys")
        stored.sql("INSERT INTO encryption_keys SELECT * FROM saved_keys")
    assert undetected == {}
    assert read(stored) == before


def test_the_command_line_shows_the_error_and_exits_1(stored: World) -> None:
    stored.sql(TAMPERED["ciphertext of another stream"])
    rows = {r["position"]: r for r in stored.json("events", "list", "--tenant", "acme", "--stream", "aes-1", code=1)}
    assert (rows[1]["status"], rows[1]["value_base64"]) == ("error", None)
    assert "AuthenticationFailed" in rows[1]["error"]
    assert rows[2]["status"] == "ok"


def test_a_swapped_tenant_key_opens_nothing(stored: World) -> None:
    stored.sql("UPDATE tenant_keys k SET wrapped = o.wrapped FROM tenant_keys o WHERE k.tenant_id = 'acme' AND o.tenant_id = 'globex'")
    said = stored.cli("-o", "json", "events", "list", "--tenant", "acme")
    assert said.returncode == 1
    assert b"acme aes" not in said.stdout
    assert {row["status"] for row in stored.events("globex")} == {"ok"}


@pytest.mark.parametrize("name", ["ciphertext of another stream", "plaintext planted", "a bit of the tag", "the wrap of another stream"])
def test_a_replay_projects_no_tampered_row_and_goes_on(make_world: Callable[..., World], name: str) -> None:
    """The view lags behind the store (here: its offsets are set back); what is projected then comes from the store, opened and checked."""
    quick = {"session.timeout.ms": 2000, "heartbeat.interval.ms": 300}  # a stopped instance's place is free after the session, see `rewind`
    world = make_world(kafka_client=quick)
    world.run()
    for stream in ("aes-1", "aes-2"):
        for n in range(2):
            world.event(world.topic("in"), b"%s %d" % (stream.encode(), n), stream=stream, partition=0)
    world.settle()
    assert world.planes[0].stop() == 0
    world.sql(TAMPERED[name])
    rewind(world)
    world.run("two")
    world.event(world.topic("in"), b"next", stream="aes-2", partition=0)
    world.settle()
    viewed = [m.value() for m in world.records(world.topic("view"))]
    again = viewed[4:]
    intact = [b"aes-2 0", b"aes-2 1", b"next"] + ([] if "wrap" in name else [b"aes-1 1"])
    assert sorted(again) == sorted(intact)
    assert '"a stored event cannot be opened"' in world.planes[-1].text()


def rewind(world: World) -> None:
    """Set the group's offset back to the start, once its last member's session ended."""
    from confluent_kafka import ConsumerGroupTopicPartitions, TopicPartition
    from confluent_kafka.admin import AdminClient

    from sidecar.kafka.client import client_config
    from tests.acceptance.world import until

    admin = AdminClient(client_config(world.settings))

    def altered() -> bool:
        wanted = ConsumerGroupTopicPartitions(world.settings.group_id, [TopicPartition(world.topic("in"), 0, 0)])
        try:
            done = admin.alter_consumer_group_offsets([wanted])[world.settings.group_id].result()
        except Exception:
            return False
        return all(tp.error is None for tp in done.topic_partitions)

    until(altered, "the group to be empty", 20)
