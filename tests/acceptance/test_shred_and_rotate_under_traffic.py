"""Promise: after the receipt nothing of the scope is stored, decrypted or shown, whatever was warm, waiting or stopped when the command came.

And after a rotation's receipt nothing is sealed with the old version. Two controls have a part of the proof taken out, and the same checker is red.
"""

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from sidecar.core.envelope import parse_header
from sidecar.core.model import Scope, ScopeKind
from sidecar.core.view import guard_stripe, view_partition
from sidecar.pipeline import Pipeline
from tests.acceptance.world import World, again_and_again, in_process, until

TENANTS = ("acme", "globex")
STREAMS = ("aes-1", "aes-2", "chacha-1", "class-1", "class-2")


def traffic(world: World, per_second: int = 2000) -> AbstractContextManager[None]:
    """Events of every tenant and stream, without a pause, until the block ends."""

    def publish(n: int) -> None:
        for tenant in TENANTS:
            for stream in STREAMS:
                world.event(world.topic("in"), b"canary %d" % n, tenant=tenant, stream=stream)

    return again_and_again(publish, len(TENANTS) * len(STREAMS) / per_second)


def warm(world: World) -> None:
    """Every stream of every tenant is in hand, its events stored and shown."""

    def stored() -> bool:
        found = {(row[0], row[1]) for row in world.sql("SELECT tenant_id, stream_id FROM messages GROUP BY 1, 2 HAVING count(*) > 20")}
        return {(tenant, stream) for tenant in TENANTS for stream in STREAMS} <= found

    until(stored, "warm caches")


def of_scope(scope: Scope, tenant: str, stream: str, stream_class: str) -> bool:
    if tenant != scope.tenant:
        return False
    return scope.kind is ScopeKind.TENANT or scope.id == (stream if scope.kind is ScopeKind.STREAM else stream_class)


def strays(world: World, scope: Scope, receipt: dict[str, Any]) -> list[str]:
    """What a shred's receipt says is impossible: payload in the view at or beyond the barrier, events that open, live keys."""
    found = []
    barrier = receipt["barrier"][world.topic("view")]
    for message in world.records(world.topic("view")):
        headers = {name: (value or b"").decode() for name, value in message.headers() or ()}
        if "ce_streamid" not in headers:
            continue  # a notice
        mine = of_scope(scope, headers["ce_tenantid"], headers["ce_streamid"], headers["ce_streamtype"])
        if mine and message.value() and message.offset() >= barrier[str(message.partition())]:
            found.append(f"view {message.partition()}/{message.offset()} beyond {barrier[str(message.partition())]}")
    classes = {row["stream_id"]: row["stream_type_class"] for row in world.sql("SELECT * FROM streams WHERE tenant_id = $1", scope.tenant)}
    for row in world.events(scope.tenant):
        if of_scope(scope, scope.tenant, row["stream_id"], classes[row["stream_id"]]) and row["status"] != "erased":
            found.append(f"{row['stream_id']}/{row['position']} reads {row['status']}")
    after = world.sql(
        "SELECT stream_id, count(*) FROM messages WHERE tenant_id = $1 AND created_at > $2::text::timestamptz GROUP BY 1",
        scope.tenant,
        receipt["inaccessible_at"],
    )
    found += [f"{n} events of {stream} stored later" for stream, n in after if of_scope(scope, scope.tenant, stream, classes[stream])]
    if scope.kind is ScopeKind.TENANT:
        keys = world.value("SELECT count(*) FROM tenant_keys WHERE tenant_id = $1 AND wrapped IS NOT NULL", scope.tenant)
    else:
        ids = [s for s, c in classes.items() if of_scope(scope, scope.tenant, s, c)] + [scope.id]
        keys = world.value(
            "SELECT count(*) FROM encryption_keys WHERE tenant_id = $1 AND scope_id = ANY ($2) AND key_material IS NOT NULL", scope.tenant, ids
        )
    return found + [f"{keys} live keys"] * bool(keys)


SCOPES = [
    Scope.of_tenant("acme"),
    Scope(tenant="acme", kind=ScopeKind.STREAM, id="aes-1"),
    Scope(tenant="acme", kind=ScopeKind.CLASS, id="Aes"),
    Scope(tenant="acme", kind=ScopeKind.CLASS, id="PerClass"),
]


@pytest.mark.parametrize("scope", SCOPES, ids=["tenant", "stream", "class of stream keys", "class with one key"])
def test_shred_under_traffic_leaves_nothing_beyond_the_barrier(world: World, scope: Scope) -> None:
    world.both("one", "two")
    with traffic(world):
        warm(world)
        receipt = world.carry_out("shred", scope)
        assert receipt["status"] == "inaccessible"
        behind = world.value("SELECT count(*) FROM messages WHERE tenant_id = 'globex'")
        until(lambda: world.value("SELECT count(*) FROM messages WHERE tenant_id = 'globex'") > behind + 500, "the other tenant goes on")
    world.settle()
    assert strays(world, scope, receipt) == []
    assert receipt["keys"]["count"] > 0
    assert receipt["events"]["unreadable"] == sum(row["status"] == "erased" for row in world.events("acme"))
    # everybody else is whole, and everything that was sent has an outcome
    others = [row for row in world.events("globex")] + [r for r in world.events("acme") if r["status"] != "erased"]
    assert {row["status"] for row in others} == {"ok"}
    outcomes = world.value("SELECT (SELECT count(*) FROM messages) + (SELECT count(*) FROM refusals)")
    assert outcomes == sum(world.sent.values())
    reason = "tenant_shredded" if scope.kind is ScopeKind.TENANT else "scope_erased"
    assert {row["reason"] for row in world.sql("SELECT DISTINCT reason FROM refusals")} == {reason}
    assert all(entry["ok"] for entry in world.json("audit", "verify"))


WITHOUT_GUARD = """
CREATE OR REPLACE FUNCTION begin_batch(stripes INT[], source_ids INT[], partitions INT[], epochs BIGINT[], starts BIGINT[], ends BIGINT[], tenant_ids TEXT[])
RETURNS TABLE (tenant_id TEXT, state TEXT, generation INT, epoch BIGINT) LANGUAGE plpgsql VOLATILE AS $$
BEGIN
  UPDATE partition_leases l SET next_offset = x.e FROM unnest(source_ids, partitions, epochs, starts, ends) x(source, part, ep, s, e)
    WHERE l.source_id = x.source AND l.partition = x.part AND l.epoch = x.ep AND l.next_offset = x.s;
  RETURN QUERY SELECT NULL::TEXT, NULL::TEXT, NULL::INT, p.version FROM policy_version p
    UNION ALL SELECT t.tenant_id, t.state, t.generation, t.epoch FROM tenants t WHERE t.tenant_id = ANY (tenant_ids);
END $$"""


class Late(Pipeline):
    """Stands still between store and view, with the batch that holds the event `late`."""

    there, go_on = threading.Event(), threading.Event()

    async def _project(self, work: Any) -> None:
        if any(headers_of(outgoing).get("ce_id") == b"late" for outgoing in work.outgoing):
            self.there.set()
            await asyncio.to_thread(self.go_on.wait, 120)
        await super()._project(work)


def shred_between_store_and_view(world: World) -> tuple[Scope, dict[str, Any]]:
    there, go_on = threading.Event(), threading.Event()
    scope = Scope.of_tenant("acme")
    world.control()
    with in_process(world, type("OneLate", (Late,), {"there": there, "go_on": go_on})):
        world.event(world.topic("in"), b"early", stream="aes-1")
        world.settle()
        world.event(world.topic("in"), b"late", stream="aes-1", id="late")
        world.flush()
        assert there.wait(120)
        receipt = world.carry_out("shred", scope)
        go_on.set()
        world.settle()
    return scope, receipt


def headers_of(outgoing: Any) -> dict[str, bytes]:
    return dict(outgoing.headers)


def test_control_without_the_guard_a_payload_appears_beyond_the_barrier(world: World) -> None:
    """A batch that stood between store and view when the shred came: nobody waited for it, nobody fenced it."""
    world.sql(WITHOUT_GUARD)
    scope, receipt = shred_between_store_and_view(world)
    assert any(stray.startswith("view") for stray in strays(world, scope, receipt))


def test_a_batch_between_store_and_view_is_fenced_before_the_receipt(world: World) -> None:
    """The same, with the guard."""
    scope, receipt = shred_between_store_and_view(world)
    assert strays(world, scope, receipt) == []
    assert [i["outcome"] for i in receipt["instances"]] == ["fenced"]


class Deaf(Pipeline):
    """Does not hear that a tenant changed: the news may come late, they prove nothing."""

    def forget(self, tenant: str) -> None:
        pass


class Trusting(Deaf):
    """And does not ask."""

    def _verify(self, *_: Any) -> None:
        pass


def write_after_the_receipt(world: World, pipeline: Callable[..., Pipeline]) -> tuple[Scope, dict[str, Any]]:
    scope = Scope.of_tenant("acme")
    world.control()
    with in_process(world, pipeline):
        world.event(world.topic("in"), b"early", stream="aes-1")
        world.settle()
        receipt = world.carry_out("shred", scope)
        world.event(world.topic("in"), b"late", stream="aes-1")
        world.settle()
    return scope, receipt


def test_control_without_the_epoch_check_warm_keys_seal_and_show_after_the_receipt(world: World) -> None:
    scope, receipt = write_after_the_receipt(world, Trusting)
    found = strays(world, scope, receipt)
    assert any("stored later" in stray for stray in found)
    assert any(stray.startswith("view") for stray in found)


def test_the_epoch_check_alone_stops_warm_keys(world: World) -> None:
    scope, receipt = write_after_the_receipt(world, Deaf)
    assert strays(world, scope, receipt) == []
    assert world.value("SELECT count(*) FROM refusals") == 1


def test_a_stopped_instance_that_holds_the_guard_is_fenced_and_its_late_commit_is_void(world: World) -> None:
    """SIGSTOP between store and view: the shred does not wait for it, and what it does when it wakes counts for nothing."""
    scope = Scope.of_tenant("acme")
    world.control(wait=False)
    stopped = world.run()
    world.planes[0].wait_ready()
    with traffic(world):
        warm(world)

        def holds() -> bool:
            """Stop it; go on unless it stands there with the guard of the tenant."""
            stopped.signal(signal.SIGSTOP)
            if world.value(
                """SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE l.locktype = 'advisory' AND l.classid = 1 AND l.objid = $1
                   AND l.mode = 'ShareLock' AND l.granted AND a.datname = current_database() AND a.state = 'idle'""",
                guard_stripe("acme"),
            ):
                return True
            stopped.signal(signal.SIGCONT)
            time.sleep(0.003)
            return False

        until(holds, "the guard in the hands of a stopped process")
    receipt = world.carry_out("shred", scope)
    assert [(i["instance_id"], i["outcome"]) for i in receipt["instances"]] == [(f"{world.name}-one", "fenced")]
    ends = world.ends(world.topic("view"))
    stopped.signal(signal.SIGCONT)
    world.settle()  # it recovers by itself
    assert strays(world, scope, receipt) == []
    partition = str(view_partition("acme/aes-1", 3))
    assert ends[int(partition)] >= receipt["barrier"][world.topic("view")][partition]
    assert {row["status"] for row in world.events("globex")} == {"ok"}
    assert sum(world.sent.values()) == world.value("SELECT (SELECT count(*) FROM messages) + (SELECT count(*) FROM refusals)")


def test_writes_after_a_shred_are_refused_and_audited_and_make_no_key(world: World) -> None:
    world.both()
    for tenant, stream in (("acme", "aes-1"), ("acme", "cart-1"), ("globex", "aes-1"), ("globex", "aes-2"), ("globex", "class-1")):
        world.event(world.topic("in"), b"v", tenant=tenant, stream=stream)
    world.settle()
    for scope in (
        Scope.of_tenant("acme"),
        *(Scope(tenant="globex", kind=k, id=i) for k, i in ((ScopeKind.STREAM, "aes-1"), (ScopeKind.CLASS, "PerClass"))),
    ):
        assert world.carry_out("shred", scope)["status"] == "inaccessible"
    before = world.value("SELECT count(*) FROM encryption_keys"), world.value("SELECT count(*) FROM tenant_keys")
    late = [
        ("acme", "aes-1"),
        ("acme", "aes-new"),
        ("acme", "cart-1"),
        ("acme", "cart-new"),
        ("globex", "aes-1"),
        ("globex", "class-1"),
        ("globex", "class-new"),
    ]
    for tenant, stream in [*late, ("globex", "aes-2")]:
        world.event(world.topic("in"), b"late", tenant=tenant, stream=stream)
    world.settle()
    assert (world.value("SELECT count(*) FROM encryption_keys"), world.value("SELECT count(*) FROM tenant_keys")) == before
    refused = [(row["tenant_id"], row["reason"]) for row in world.sql("SELECT * FROM refusals")]
    assert sorted(refused) == [("acme", "tenant_shredded")] * 4 + [("globex", "scope_erased")] * 3
    rows = world.sql("SELECT details FROM audit_log WHERE action = 'refuse_records'")
    assert sum(entry["records"] for row in rows for entry in row["details"]["refused"]) == len(late)
    assert [row["value"] for row in world.events("globex", stream="aes-2")] == [b"v", b"late"]
    assert world.dead_letters() == {}
    assert b"late" not in [m.value() for m in world.records(world.topic("view")) if dict(m.headers() or ()).get("ce_streamid") != b"aes-2"]


def test_a_stream_is_fenced_before_its_first_event(world: World) -> None:
    world.both()
    world.event(world.topic("in"), b"v", stream="aes-1")
    world.settle()
    receipt = world.carry_out("shred", Scope(tenant="acme", kind=ScopeKind.STREAM, id="aes-unknown"))
    assert (receipt["status"], receipt["keys"]["count"], receipt["note"]) == ("inaccessible", 0, "nothing_found, fenced")
    keys = world.value("SELECT count(*) FROM encryption_keys")
    world.event(world.topic("in"), b"first", stream="aes-unknown")
    world.event(world.topic("in"), b"next", stream="aes-1")
    world.settle()
    assert [(row["tenant_id"], row["reason"]) for row in world.sql("SELECT * FROM refusals")] == [("acme", "scope_erased")]
    assert world.value("SELECT count(*) FROM encryption_keys") == keys
    assert world.events("acme", stream="aes-unknown") == []
    assert [row["status"] for row in world.events("acme")] == ["ok", "ok"]


@pytest.mark.parametrize("scope", SCOPES, ids=["tenant", "stream", "class of stream keys", "class with one key"])
def test_rotation_under_traffic_every_event_opens_and_the_old_version_seals_nothing_after_the_receipt(world: World, scope: Scope) -> None:
    world.both("one", "two")
    with traffic(world):
        warm(world)
        receipt = world.carry_out("rotate", scope)
        assert receipt["status"] == "done"
        last = world.value("SELECT max(global_position) FROM messages")
        for stream in STREAMS:
            until(
                lambda s=stream: (
                    world.value("SELECT count(*) FROM messages WHERE tenant_id = 'acme' AND stream_id = $1 AND global_position > $2", s, last) > 20
                ),
                "more",
            )
    world.settle()
    assert {row["status"] for tenant in TENANTS for row in world.events(tenant)} == {"ok"}
    versions = version_of_each(world, last)
    for (tenant, stream), (before, after) in versions.items():
        if of_scope(scope, tenant, stream, {"aes": "Aes", "chacha": "ChaCha", "class": "PerClass"}[stream.split("-")[0]]):
            assert before <= {1, 2}, "the version is made by the first write behind the rotation"
            assert after == {2}, f"{tenant} {stream} sealed with {after} after the receipt"
        else:
            assert before == after == {1}
    assert {k["state"] for k in world.json("keys", "list", "--tenant", "acme") if k["key_version"] == 2} == {"active"}


def version_of_each(world: World, last: int) -> dict[tuple[str, str], tuple[set[int], set[int]]]:
    """(tenant, stream) → the key versions that sealed up to a global position, and behind it."""
    out: dict[tuple[str, str], tuple[set[int], set[int]]] = {}
    for row in world.sql("SELECT tenant_id, stream_id, global_position, data_encrypted FROM messages"):
        of = out.setdefault((row["tenant_id"], row["stream_id"]), (set(), set()))
        of[row["global_position"] > last].add(parse_header(bytes(row["data_encrypted"])).key_version)
    return out
