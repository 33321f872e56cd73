"""What must not happen on the data path, numbered as in the issue. Each has a control: the same check, red on a broken variant."""

from collections.abc import Callable
from typing import Any

import pytest

from sidecar.core.aead import Suite
from sidecar.core.envelope import parse_header
from sidecar.core.errors import KeyShredded, SidecarError
from sidecar.core.model import Scope, ScopeKind
from sidecar.core.streams import Tenant
from sidecar.dead_letters import DeadLetters
from sidecar.event_store import open_row
from sidecar.kafka.producer import Outgoing
from sidecar.pipeline import Pipeline
from sidecar.postgres import keystore
from sidecar.replay import Replay
from sidecar.work import Faulty, Work
from tests.acceptance.world import World, in_process

ACME = Scope.of_tenant("acme")
STREAM = Scope(tenant="acme", kind=ScopeKind.STREAM, id="aes-1")
CLASS = Scope(tenant="acme", kind=ScopeKind.CLASS, id="Aes")
PLAIN = Scope(tenant="acme", kind=ScopeKind.STREAM, id="cart-1")


def payload(what: str, stream: str = "aes-1") -> bytes:
    return f"the payload {what} of {stream}".encode()


def send(world: World, what: str) -> None:
    """An event of acme in a stream with a key and one in a plain stream, on one partition."""
    for stream in ("aes-1", "cart-1"):
        world.event(world.topic("in"), payload(what, stream), stream=stream, partition=0)


def send_faulty(world: World, what: str, stream: str = "aes-1") -> None:
    """A record that could not be stored in any case."""
    world.event(world.topic("in"), payload(what, stream), stream=stream, partition=0, headers=[("ce_type", b"\0")])


def kept(world: World, value: bytes) -> list[str]:
    """Where something of a payload that must not be there is: opens, stands in a view, or would be sealed away for somebody."""
    found = [f"{row['stream_id']}/{row['position']} reads" for row in world.events("acme") if row["value"] == value]
    found += [f"view {m.partition()}/{m.offset()}" for m in world.records(world.topic("view")) if m.value() == value]
    found += ["a dead letter's value"] * world.value("SELECT count(*) FROM dead_letters WHERE value_encrypted IS NOT NULL")
    found += [f"a log: {plane.log}" for plane in world.planes if value.decode() in plane.text()]
    return found


def live_keys(world: World, scope: Scope) -> int:
    if scope.kind is ScopeKind.TENANT:
        return int(world.value("SELECT count(*) FROM tenant_keys WHERE tenant_id = $1 AND wrapped IS NOT NULL", scope.tenant))
    sql = "SELECT count(*) FROM encryption_keys WHERE tenant_id = $1 AND scope_id IN ('aes-1', $2) AND key_material IS NOT NULL"
    return int(world.value(sql, scope.tenant, scope.id))


def refused(world: World) -> list[tuple[str, int]]:
    """Reason and count, and the same counts in the audit trail."""
    rows = world.sql("SELECT reason, count(*) FROM refusals GROUP BY 1 ORDER BY 1")
    audited = world.value(
        """SELECT coalesce(sum((r->>'records')::int), 0) FROM audit_log a, jsonb_array_elements(a.details->'refused') r
           WHERE a.action = 'refuse_records'"""
    )
    assert audited == sum(row["count"] for row in rows)
    return [(row["reason"], row["count"]) for row in rows]


def readmit(world: World, scope: Scope) -> None:
    assert world.carry_out("readmit", scope)["status"] == "done"


# ── 1. a key resurrected by a write after a shred ───────────────────────────────────────────────────────────────────────


def write_after_a_shred(world: World, scope: Scope) -> None:
    world.control()
    with in_process(world, Pipeline):
        world.event(world.topic("in"), payload("early"), stream="aes-1")
        world.settle()
        assert world.carry_out("shred", scope)["status"] == "inaccessible"
        world.event(world.topic("in"), payload("late"), stream="aes-1")
        send_faulty(world, "late")
        world.settle()


@pytest.mark.parametrize("scope", [ACME, STREAM, CLASS], ids=lambda scope: scope.kind.value)
def test_01_a_write_after_shred_resurrects_no_key(world: World, scope: Scope) -> None:
    write_after_a_shred(world, scope)
    assert (live_keys(world, scope), kept(world, payload("late"))) == (0, [])
    assert refused(world) == [("tenant_shredded" if scope is ACME else "scope_erased", 2)]


def test_01_control_a_writer_that_does_not_see_the_fence_makes_the_key_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    blind = keystore._STREAMS.replace("EXISTS (SELECT 1 FROM erased_scopes", "false AND EXISTS (SELECT 1 FROM erased_scopes")
    assert blind != keystore._STREAMS
    monkeypatch.setattr(keystore, "_STREAMS", blind)
    write_after_a_shred(world, STREAM)
    assert live_keys(world, STREAM) == 1
    assert kept(world, payload("late"))


# ── 5, 14. late data, also after a readmission ──────────────────────────────────────────────────────────────────────────


def late_data_after_a_readmission(world: World, scope: Scope) -> None:
    """`late` stood in the topic when the scope was shredded, and comes to the store after the readmission; `new` was sent after it."""
    world.control()
    with in_process(world, Pipeline):
        send(world, "early")
        world.settle()
    send(world, "late")
    send_faulty(world, "late", "cart-1" if scope is PLAIN else "aes-1")
    world.flush()
    assert world.carry_out("shred", scope)["status"] == "inaccessible"
    readmit(world, scope)
    with in_process(world, Pipeline):
        send(world, "new")
        world.settle()


@pytest.mark.parametrize("scope", [ACME, STREAM, CLASS, PLAIN], ids=["tenant", "stream", "class", "plain stream"])
def test_05_late_data_is_refused_also_after_a_readmission(world: World, scope: Scope) -> None:
    late_data_after_a_readmission(world, scope)
    gone = {"aes-1", "cart-1"} if scope is ACME else {"cart-1"} if scope is PLAIN else {"aes-1"}
    for stream in ("aes-1", "cart-1"):
        assert bool(kept(world, payload("late", stream))) is (stream not in gone)
        assert in_view(world, "new", stream) == 1
    assert refused(world) == [("tenant_shredded", 3) if scope is ACME else ("scope_erased", 2)]
    read = {row["value"]: row["status"] for row in world.events("acme") if row["stream_id"] == "aes-1"}
    assert read[payload("new")] == "ok"
    assert (payload("early") in read) is (scope is PLAIN)


def test_05_control_without_the_barriers_late_data_comes_in(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tenant, "is_late", lambda *_: False)
    late_data_after_a_readmission(world, ACME)
    assert kept(world, payload("late"))


class Stopped(SidecarError):
    """A test ends the instance here."""


class DiesBeforeTheView(Pipeline):
    """Projects nothing, and ends when two records are stored, in one batch or in two."""

    async def _project(self, work: Work) -> None:
        if sum(lease.stored for lease in self.owned.values()) == 2:
            raise Stopped


def replay_after(world: World, scope: Scope, *, readmitted: bool) -> None:
    """`old` was stored and not projected when its scope was shredded; the next instance replays it."""
    world.control()
    send(world, "old")
    world.flush()
    with in_process(world, DiesBeforeTheView, dies=True):
        pass
    assert (world.value("SELECT count(*) FROM messages"), in_view(world, "old")) == (2, 0)
    assert world.carry_out("shred", scope)["status"] == "inaccessible"
    if readmitted:
        readmit(world, scope)
    with in_process(world, Pipeline):
        send(world, "new")
        world.settle()


def in_view(world: World, what: str, *streams: str) -> int:
    values = {payload(what, stream) for stream in streams or ("aes-1", "cart-1")}
    return sum(message.value() in values for message in world.records(world.topic("view")))


@pytest.mark.parametrize("readmitted", [False, True], ids=["shredded", "readmitted"])
@pytest.mark.parametrize(("scope", "others"), [(ACME, 0), (STREAM, 1), (PLAIN, 1)], ids=["tenant", "stream", "plain stream"])
def test_14_a_replay_after_a_shred_and_a_readmission_shows_nothing_of_it(world: World, scope: Scope, others: int, readmitted: bool) -> None:
    replay_after(world, scope, readmitted=readmitted)
    assert in_view(world, "old") == others  # of the stream that was not shredded
    assert in_view(world, "new") == (2 if readmitted else others)
    values = {row["stream_id"]: row["status"] for row in world.events("acme") if row["position"] == 1}
    assert values["aes-1"] == ("ok" if scope is PLAIN else "erased")


def from_the_source(self: Replay, work: Work) -> list[Outgoing]:
    """The defect: what may not be projected is taken from the topic again."""
    again = {at: range(*offsets) for at, offsets in work.replays.items()}
    view = self._views._views[0]
    return [
        Outgoing(view.settings.topic, 0, m.key(), m.value(), m.headers())
        for m in work.batch.messages
        if m.offset() in again.get((m.topic(), m.partition()), ())
    ]


def without_the_barrier(self: Replay, work: Work) -> list[Outgoing]:
    """The defect: whatever still opens is shown."""
    out = []
    for row in work.stored_rows:
        try:
            event = open_row(row, work.ciphers)  # type: ignore[arg-type]
        except KeyShredded:
            continue
        out.append(Outgoing(self._views._views[0].settings.topic, 0, event.key, event.value, event.headers))
    return out


@pytest.mark.parametrize(("defect", "strays"), [(from_the_source, 2), (without_the_barrier, 1)])
def test_14_control_a_replay_from_the_source_or_of_all_that_opens_shows_it(
    world: World, monkeypatch: pytest.MonkeyPatch, defect: Callable[..., Any], strays: int
) -> None:
    monkeypatch.setattr(Replay, "records", defect)
    replay_after(world, ACME, readmitted=True)
    assert in_view(world, "old") == strays


# ── dead letters go with their scope ────────────────────────────────────────────────────────────────────────────────────


def opens_after_a_shred(world: World, scope: Scope) -> int:
    """How many dead letters of the scope have a value whose key is left, after the scope was shredded."""
    world.control()
    with in_process(world, Pipeline):
        send(world, "early")
        world.settle()
        send_faulty(world, "faulty")
        world.settle()
    assert world.value("SELECT count(*) FROM dead_letters WHERE value_encrypted IS NOT NULL") == 1
    assert world.carry_out("shred", scope)["status"] == "inaccessible"
    left = 0
    for row in world.sql("SELECT value_encrypted FROM dead_letters"):
        key = parse_header(bytes(row["value_encrypted"]))
        sql = "SELECT count(*) FROM encryption_keys WHERE (key_id, key_version) = ($1, $2) AND key_material IS NOT NULL"
        left += world.value(sql, key.key_id, key.key_version)
    return left


@pytest.mark.parametrize("scope", [STREAM, CLASS], ids=["stream", "class"])
def test_a_dead_letter_that_names_a_stream_cannot_be_read_after_the_streams_or_its_classs_shred(world: World, scope: Scope) -> None:
    assert opens_after_a_shred(world, scope) == 0


def test_control_a_dead_letter_under_the_tenants_key_survives_its_streams_shred(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def tenants_key(self: DeadLetters, work: Work, fault: Faulty) -> Any:
        tenant = self._streams.tenants[b"acme"]
        return await self._streams.shared_key(ACME, tenant, Suite.AES_256_GCM, work.fresh)

    monkeypatch.setattr(DeadLetters, "_key", tenants_key)
    assert opens_after_a_shred(world, STREAM) == 1
