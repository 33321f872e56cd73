"""Promise: a key that has sealed as often as it should is rotated by itself, and none seals beyond the hard limit, whoever shares it.

And the history of a stream's keys is right to the position, over rotations, redone batches, crashes and rebalances.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from uuid import UUID

import pytest

from sidecar.core.envelope import parse_header
from sidecar.core.keys import UseLimits
from sidecar.core.model import Scope, ScopeKind
from sidecar.pipeline import Pipeline, Ports
from tests.acceptance.key_history import key_history_faults
from tests.acceptance.test_shred_and_rotate_under_traffic import in_process
from tests.acceptance.world import World, again_and_again, until

POLICIES = {
    "install": [
        {"class": "PerClass", "key_scope": "class"},
        {"class": "PerTenant", "key_scope": "tenant", "algorithm": "ChaCha20-Poly1305"},
        {"class": "Siv", "key_scope": "subject"},
    ]
}
STREAMS = ("aes-1", "class-1", "tenant-1", "siv-1")


def limited(make_world: Callable[..., World], *, soft: int, hard: int, block: int, records: int = 5) -> World:
    limits = {"soft_uses": soft, "hard_uses": hard, "uses_block": block}
    return make_world(policies=POLICIES, limits=limits, batch={"max_records": records, "max_wait_ms": 5})


def seals(world: World) -> Counter[tuple[UUID, int]]:
    """Key version → how many stored bytes it has sealed."""
    rows = world.sql("SELECT data_encrypted AS sealed FROM messages UNION ALL SELECT value_encrypted FROM dead_letters")
    headers = [parse_header(bytes(row["sealed"])) for row in rows if row["sealed"] is not None]
    return Counter((header.key_id, header.key_version) for header in headers)


def overuses(world: World, hard: int) -> list[str]:
    """What counting must rule out: a version that sealed more than is allowed, or more than was set aside of it."""
    reserved = {(r["key_id"], r["key_version"]): (r["scope_kind"], r["uses_reserved"]) for r in world.sql("SELECT * FROM encryption_keys")}
    found = []
    for key, n in seals(world).items():
        kind, uses = reserved[key]
        if n > hard:
            found.append(f"{kind} version {key[1]} sealed {n} of {hard}")
        if kind != "stream" and n > uses:
            found.append(f"{kind} version {key[1]} sealed {n}, reserved {uses}")
    return found


def send(world: World, stream: str, count: int, **more: Any) -> None:
    for _ in range(count):
        world.event(world.topic("in"), b"v", stream=stream, headers=(("ce_subjectid", b"jane"),), **more)


def test_keys_of_every_scope_are_rotated_at_the_soft_limit(make_world: Callable[..., World]) -> None:
    world = limited(make_world, soft=12, hard=1000, block=4)
    world.run()
    for stream in STREAMS:
        send(world, stream, 60)
    world.settle()
    assert Counter(row["status"] for row in world.events("acme")) == {"ok": 240}
    versions = Counter(row["scope_kind"] for row in world.sql("SELECT * FROM encryption_keys"))
    assert min(versions.values()) >= 4
    assert max(seals(world).values()) < 12 + 5, "soft by less than a batch"
    assert overuses(world, 1000) == []
    assert key_history_faults(world) == []
    assert world.value("SELECT count(*) FROM encryption_keys WHERE is_active") == 4
    rotated = [key for row in world.sql("SELECT details FROM audit_log WHERE action = 'keys.rotate'") for key in row["details"]["keys"]]
    assert sorted(rotated) == sorted(f"{r[0]}/{r[1]}" for r in world.sql("SELECT key_id, key_version FROM encryption_keys WHERE NOT is_active"))
    listed = {k["uses"] for k in world.json("keys", "list", "--tenant", "acme") if k["scope_kind"] == "stream" and k["state"] == "retired"}
    assert listed <= set(range(8, 13))


def test_dead_letters_count_too(make_world: Callable[..., World]) -> None:
    world = limited(make_world, soft=10, hard=20, block=3)
    world.run()
    send(world, "tenant-1", 20)
    for _ in range(30):
        world.event(world.topic("in"), b"v", stream="\x07")
    send(world, "tenant-1", 20)
    world.settle()
    assert world.value("SELECT count(*) FROM dead_letters WHERE value_encrypted IS NOT NULL") == 30
    assert Counter(row["status"] for row in world.events("acme")) == {"ok": 40}
    assert max(seals(world).values()) <= 20
    assert key_history_faults(world) == []


def test_a_key_that_would_seal_beyond_the_hard_limit_is_rotated_and_nobody_waits(make_world: Callable[..., World]) -> None:
    """Also where the soft limit, wrongly set, would not have it rotated before."""
    world = limited(make_world, soft=1000, hard=20, block=7)
    world.run()
    for stream in STREAMS:
        send(world, stream, 50)
        send(world, "cart-1", 10)
    world.settle()
    assert Counter(row["status"] for row in world.events("acme")) == {"ok": 240}
    assert overuses(world, 20) == []
    assert min(Counter(row["scope_kind"] for row in world.sql("SELECT * FROM encryption_keys")).values()) >= 3
    assert key_history_faults(world) == []


class Unlimited(Pipeline):
    """Sets aside as many uses as a batch has records."""

    def __init__(self, ports: Ports) -> None:
        super().__init__(ports)
        ports.streams._limits = UseLimits(soft=1000, hard=1000, block=7)


def test_control_without_the_hard_limit_a_key_seals_beyond_it(make_world: Callable[..., World]) -> None:
    world = limited(make_world, soft=1000, hard=20, block=7)
    with in_process(world, Unlimited):
        send(world, "aes-1", 50)
        world.settle()
    assert any("of 20" in fault for fault in overuses(world, 20))


class Uncounted(Pipeline):
    """Each instance counts for itself alone."""

    def __init__(self, ports: Ports) -> None:
        super().__init__(ports)
        ports.streams._reserve = lambda *_: None  # type: ignore[method-assign]


def share(world: World, pipeline: type[Pipeline]) -> None:
    """Two instances, a partition each, seal with the one key of a class."""
    with ExitStack() as stack:
        for name in ("one", "two"):
            stack.enter_context(in_process(world, pipeline, name))
        owners = "SELECT count(DISTINCT owner) FROM partition_leases WHERE owner IS NOT NULL"
        send(world, "class-0", 1, partition=0)
        send(world, "class-1", 1, partition=1)
        until(lambda: world.value(owners) == 2, "a partition for each")
        for _ in range(20):
            send(world, "class-0", 6, partition=0)
            send(world, "class-1", 6, partition=1)
            world.settle()


def test_instances_that_share_a_key_do_not_exceed_what_each_has_reserved(make_world: Callable[..., World]) -> None:
    world = limited(make_world, soft=50, hard=60, block=7)
    share(world, Pipeline)
    assert overuses(world, 60) == []
    assert Counter(row["status"] for row in world.events("acme")) == {"ok": 242}
    assert key_history_faults(world) == []
    assert all(entry["ok"] for entry in world.json("audit", "verify"))


def test_control_without_reservations_a_shared_key_seals_beyond_the_hard_limit(make_world: Callable[..., World]) -> None:
    world = limited(make_world, soft=50, hard=60, block=7)
    share(world, Uncounted)
    assert any("of 60" in fault for fault in overuses(world, 60))


# the history, to the position


def traffic(world: World) -> AbstractContextManager[None]:
    """Events of every kind of key, without a pause, on both partitions."""

    def publish(n: int) -> None:
        for stream, partition in (("aes-0", 0), ("aes-1", 1), ("class-0", 0), ("class-1", 1), ("tenant-0", 0), ("siv-0", 0), ("siv-1", 1)):
            subject = (("ce_subjectid", b"p%d" % (n % 5)),)
            world.event(world.topic("in"), b"v", stream=stream, partition=partition, headers=subject)

    return again_and_again(publish, 0.01)


def more(world: World, count: int) -> None:
    seen = world.value("SELECT count(*) FROM messages")
    until(lambda: world.value("SELECT count(*) FROM messages") > seen + count, "more events", 150)


def test_the_history_is_exact_over_rotations_crashes_and_rebalances(make_world: Callable[..., World]) -> None:
    world = limited(make_world, soft=150, hard=10_000, block=20, records=100)
    world.control(wait=False)
    first = world.run()
    world.planes[0].wait_ready()
    scopes = [Scope.of_tenant("acme"), *(Scope(tenant="acme", kind=k, id=i) for k, i in ((ScopeKind.STREAM, "aes-0"), (ScopeKind.CLASS, "PerClass")))]
    with traffic(world):
        more(world, 300)
        for scope in scopes:
            assert world.carry_out("rotate", scope)["status"] == "done"
            more(world, 200)
        second = world.run("two")  # rebalance
        more(world, 300)
        first.kill()
        assert world.carry_out("rotate", scopes[0])["status"] == "done"
        more(world, 300)
        world.run()  # the killed one comes back
        assert world.carry_out("rotate", Scope(tenant="acme", kind=ScopeKind.SUBJECT, id="p1"))["status"] == "done"
        more(world, 300)
        second.stop()
        more(world, 300)
    world.settle()
    assert key_history_faults(world) == []
    assert overuses(world, 10_000) == []
    assert {row["status"] for row in world.events("acme")} == {"ok"}
    assert world.value("SELECT count(*) FROM messages") == sum(world.sent.values())
    assert world.value("SELECT max(key_version) FROM encryption_keys WHERE scope_kind = 'stream'") > 3


class Late(Pipeline):
    """Notes a key's use one event too late."""

    def __init__(self, ports: Ports) -> None:
        super().__init__(ports)
        note = ports.streams.note_use

        def late(tenant: Any, stream: Any, key: Any, subject: Any, position: int, fresh: Any) -> None:
            note(tenant, stream, key, subject, position + (position > 1), fresh)

        ports.streams.note_use = late  # type: ignore[method-assign]


@pytest.mark.parametrize("stream", STREAMS)
def test_control_a_use_that_is_noted_late_is_found(make_world: Callable[..., World], stream: str) -> None:
    world = limited(make_world, soft=12, hard=1000, block=4)
    with in_process(world, Late):
        send(world, stream, 30)
        world.settle()
    assert key_history_faults(world)
