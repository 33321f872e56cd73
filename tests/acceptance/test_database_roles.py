"""Both planes under database roles of their own: they do their work, and what is not theirs to do Postgres refuses."""

import asyncio
import json
import secrets
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from sidecar import Erased, Event, NewEvent, open_library
from sidecar.core.audit import tenant_ref
from sidecar.core.errors import AccessDenied
from sidecar.postgres import roles
from sidecar.postgres.connection import connect
from sidecar.postgres.errors import mapped
from sidecar.settings import load
from tests.acceptance.world import World, blocking, until


@dataclass
class Roles:
    """A world whose planes log in as members of the roles of `sidecar db roles`."""

    world: World
    prefix: str
    logins: dict[str, str] = field(default_factory=dict)

    def dsn(self, role: str, query: str = "") -> str:
        parts = urlsplit(self.world.dsn)
        return parts._replace(netloc=f"{self.logins[role]}@{parts.hostname}:{parts.port}", query=query).geturl()

    def as_(self, role: str, *statements: str, tenant: str = "*") -> list[Any]:
        """The rows of the last statement. Raises AccessDenied."""
        query = f"search_path={self.prefix}_reader,public&sidecar.tenant={tenant}" if role == "reader" else ""

        async def main() -> list[Any]:
            connection = await connect(self.dsn(role, query))
            try:
                with mapped():
                    for statement in statements:
                        rows = await connection.fetch(statement)
                    return rows
            finally:
                await connection.close()

        return blocking(main)


def owner_does(dsn: str, *statements: str) -> None:
    async def main() -> None:
        connection = await asyncpg.connect(dsn)
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    blocking(main)


@pytest.fixture
def made(world: World) -> Iterator[Roles]:
    prefix = f"r{secrets.token_hex(5)}"
    here = Roles(world, prefix, {name: f"{prefix}_{name}_login" for name in roles.ROLES})
    try:
        for _ in range(2):  # run again after each migration
            done = world.json("db", "roles", "--prefix", prefix)
            assert [row["role"] for row in done] == [f"{prefix}_{name}" for name in roles.ROLES]
        owner_does(world.dsn, *(f"CREATE ROLE {login} LOGIN IN ROLE {prefix}_{name}" for name, login in here.logins.items()))
        document = json.loads(world.config.read_text())
        reader = here.dsn("reader", f"search_path={prefix}_reader,public&sidecar.tenant=*")
        own = {f"dsn_{name}": here.dsn(name) for name in ("data", "control", "worker", "migrator")} | {"dsn_reader": reader}
        world.config.write_text(json.dumps(document | {"postgres": {"dsn": "postgresql://nobody@127.0.0.1:1/none"} | own}))
        yield here  # the planes and the command line are members; the test itself goes on as the owner
    finally:
        world.close()
        everyone = ", ".join([*here.logins.values(), *(f"{prefix}_{name}" for name in roles.ROLES)])
        owner_does(world.dsn, f"DROP OWNED BY {everyone} CASCADE", f"DROP ROLE {everyone}")


def fill(world: World) -> None:
    for tenant in ("acme", "zeta"):
        for stream in ("aes-1", "cart-1", "class-1"):
            for number in range(5):
                world.event(f"{world.name}.in", b"%d" % number, tenant=tenant, stream=stream)
    world.event(f"{world.name}.in", b"x", tenant="no tenant!", stream="s")
    world.settle()


def test_both_planes_work_under_their_own_roles(made: Roles) -> None:
    world = made.world
    world.run()
    world.control()
    fill(world)
    assert world.json("rotate", "--tenant", "acme", "--reason", "r", "--wait", "100")["status"] == "done"
    fill(world)
    events = world.json("events", "list", "--tenant", "acme")
    assert {event["status"] for event in events} == {"ok"}
    assert len(events) == 30
    assert {key["state"] for key in world.json("keys", "list", "--tenant", "acme")} == {"active", "retired"}
    held = world.json("hold", "--tenant", "acme", "--reason", "r", "--wait", "100")
    assert world.json("shred", "--tenant", "acme", "--reason", "r", "--yes", "--wait", "100", code=3)["error"]["code"] == "legal_hold"
    world.json("release", "--hold", held["holds"][0], "--reason", "r", "--wait", "100")
    receipt = world.json("shred", "--tenant", "acme", "--reason", "r", "--yes", "--include-plain", "--wait", "100")
    assert (receipt["status"], receipt["events"]["unreadable"]) == ("inaccessible", 20)
    assert {event["status"] for event in world.json("events", "list", "--tenant", "acme")} <= {"erased"}
    assert {event["status"] for event in world.json("events", "list", "--tenant", "zeta")} == {"ok"}
    (world.folder / "siv.yaml").write_text('[{"class": "Siv", "fields": ["/email"], "blind_index": ["/email"]}]')
    world.json("policy", "apply", str(world.folder / "siv.yaml"))
    world.event(f"{world.name}.in", b'{"email": "jane"}', tenant="zeta", stream="siv-1")
    world.settle()
    find = ("events", "find", "--tenant", "zeta", "--field", "/email", "--value", "jane")
    assert [row["stream_id"] for row in world.json(*find)] == ["siv-1"]
    world.json("shred", "--tenant", "zeta", "--stream", "siv-1", "--reason", "r", "--yes", "--wait", "100")
    assert world.json(*find) == []
    until(lambda: world.value("SELECT count(*) FROM blind_index") == 0, "the control role to remove the rows")
    for words in (("receipts", "list"), ("audit", "tail"), ("audit", "verify"), ("status",), ("dlq", "list"), ("holds", "list"), ("policy", "list")):
        world.json(*words)
    world.json("db", "migrate")


def test_a_worker_seals_events_anew_under_a_role_of_its_own(made: Roles) -> None:
    world = made.world
    world.control()
    world.start("worker").wait_ready()

    async def main() -> None:
        async with open_library(load(world.config), writer="library-test") as library:
            for stream in ("aes-1", "class-1", "cart-1"):
                await library.store.append_to_stream(stream, [NewEvent(type="T", data=n) for n in range(5)], tenant="acme")

    blocking(main)
    before = world.json("events", "list", "--tenant", "acme")
    for words in (("rotate",), ("reencrypt", "--split")):
        done = world.json(*words, "--tenant", "acme", "--reason", "r", "--wait", "100")
        assert done["status"] == "done"
    assert done["events"] == {"resealed": 10, "left": 0, "chunks": 1}
    copied = world.json("reencrypt", "--tenant", "acme", "--stream", "aes-1", "--into", "aes-7", "--reason", "r", "--wait", "100")
    assert copied["events"]["resealed"] == 5
    assert [event for event in world.json("events", "list", "--tenant", "acme") if event["stream_id"] != "aes-7"] == before


def test_an_import_runs_under_the_data_planes_role(made: Roles, tmp_path: Path) -> None:
    world, table = (
        made.world,
        "CREATE TABLE legacy (id BIGINT PRIMARY KEY, data JSONB); INSERT INTO legacy SELECT n, '1' FROM generate_series(1, 5) n",
    )
    owner_does(world.dsn, table, f"GRANT SELECT ON legacy TO {made.logins['data']}")
    (tmp_path / "map.yaml").write_text("""
name: legacy
source: {table: legacy}
order: [id]
events: {tenant: {const: acme}, stream: {const: aes-1}, position: id, type: {const: T}, data: data}
""")
    said = world.cli("-o", "json", "import", "--map", str(tmp_path / "map.yaml"))
    assert said.returncode == 0, said.stderr.decode()
    assert json.loads(said.stdout.splitlines()[-1]) | {"imported": 5, "faults": []} == json.loads(said.stdout.splitlines()[-1])


def test_a_library_under_the_data_planes_role_is_forgotten_by_command_and_may_destroy_nothing_itself(made: Roles) -> None:
    world = made.world
    world.control()

    async def main() -> None:
        async with open_library(load(world.config), writer="library-test") as library:
            for stream in ("aes-1", "aes-2"):
                await library.store.append_to_stream(stream, [NewEvent(type="T", data="x")], tenant="acme")
            receipt = await library.shredding.forget_stream_data("aes-1", "acme", reason="r")
            assert (receipt["status"], receipt["events"]["unreadable"]) == ("inaccessible", 1)
            assert [type(held) for held in (await library.store.read_stream("aes-1", tenant="acme")).events] == [Erased]
            assert [type(held) for held in (await library.store.read_stream("aes-2", tenant="acme")).events] == [Event]
            for denied in (
                library.shredding.rotate_stream_key("aes-2", "acme"),
                library.policies.delete_policy("default-cart-data", actor="a", reason="r"),
            ):
                with pytest.raises(AccessDenied):
                    await denied
            assert await library.shredding.is_data_forgettable("acme")

    blocking(main)


def test_a_consumer_under_the_data_planes_role_sets_aside_what_is_poison(made: Roles) -> None:
    async def main() -> None:
        async with open_library(load(made.world.config), writer="library-test") as library:
            for stream in ("aes-1", "aes-2"):
                await library.store.append_to_stream(stream, [NewEvent(type="T", data="x")], tenant="acme")
            stop = asyncio.Event()

            async def handle(event: Event | Erased) -> None:
                if event.stream == "aes-1":
                    raise ValueError("poison")
                stop.set()

            async with asyncio.timeout(120):
                await library.consumer("c").run(handle, stop)

    blocking(main)
    [row] = made.world.sql("SELECT stream_id, error FROM consumer_set_aside")
    assert tuple(row) == ("aes-1", "ValueError")


def test_a_data_plane_that_holds_on_to_the_guard_is_fenced_by_a_control_role(made: Roles) -> None:
    """Ending another user's session needs a right of its own."""
    world = made.world
    stopped = world.run()
    world.control()
    fill(world)
    stopped.signal(signal.SIGSTOP)
    receipt = world.json("shred", "--tenant", "acme", "--reason", "r", "--yes", "--wait", "100")
    assert receipt["status"] == "inaccessible"
    assert len(receipt["instances"]) == 1


FORBIDDEN = {
    "data": [
        "DELETE FROM encryption_keys",
        "DELETE FROM messages",
        "TRUNCATE messages",
        "UPDATE messages SET data = ''",
        "UPDATE tenant_keys SET state = 'destroyed', wrapped = NULL",
        "UPDATE encryption_keys SET key_material = NULL",
        "UPDATE encryption_keys SET is_destroyed = true",
        "UPDATE tenants SET state = 'active'",
        "UPDATE erased_scopes SET readmitted_at = now()",
        "INSERT INTO erased_scopes (tenant_id, scope_kind, scope_id, command_id, fingerprints) VALUES ('acme', 's', 's', gen_random_uuid(), '{}')",
        "INSERT INTO commands (command_id, op, payload, payload_sha256, status) VALUES (gen_random_uuid(), 'shred', '', '', 'accepted')",
        "UPDATE legal_holds SET released_at = now()",
        "SELECT * FROM commands",
        "SELECT * FROM quarantined_keys",
        "SELECT salt FROM certificates",
        "UPDATE audit_log SET actor = 'nobody'",
        "DELETE FROM audit_log",
        "DELETE FROM shred_barriers",
        "UPDATE encryption_policies SET encryption_required = false",
        "CREATE TABLE t (i INT)",
        "ALTER TABLE messages ADD COLUMN c INT",
        "DROP TABLE messages CASCADE",
    ],
    "control": [
        "UPDATE audit_log SET actor = 'nobody'",
        "DELETE FROM audit_log",
        "UPDATE ledger SET envelope = ''",
        "DELETE FROM ledger",
        "DELETE FROM encryption_keys",
        "DELETE FROM commands",
        "DELETE FROM legal_holds",
        "UPDATE certificates SET envelope = ''",
        "CREATE TABLE t (i INT)",
        "DROP TABLE messages CASCADE",
    ],
    "worker": [
        "DELETE FROM messages",
        "UPDATE messages SET stream_position = 7",
        "DELETE FROM encryption_keys",
        "UPDATE encryption_keys SET key_material = NULL",
        "UPDATE tenant_keys SET state = 'destroyed', wrapped = NULL",
        "UPDATE tenants SET state = 'active'",
        "UPDATE erased_scopes SET readmitted_at = now()",
        "INSERT INTO commands (command_id, op, payload, payload_sha256, status) VALUES (gen_random_uuid(), 'shred', '', '', 'accepted')",
        "SELECT * FROM commands",
        "UPDATE jobs SET tenant_id = 'zeta'",
        "UPDATE audit_log SET actor = 'nobody'",
        "CREATE TABLE t (i INT)",
    ],
    "reader": [
        "INSERT INTO tenants (tenant_id) VALUES ('t')",
        "UPDATE streams SET position = 0",
        "DELETE FROM messages",
        "SELECT * FROM public.messages",
        "SELECT * FROM public.tenant_keys",
        "SELECT * FROM quarantined_keys",
        "CREATE TABLE t (i INT)",
    ],
}


def test_what_is_not_theirs_to_do_is_denied(made: Roles) -> None:
    for role, statements in FORBIDDEN.items():
        for statement in statements:
            with pytest.raises(AccessDenied):
                made.as_(role, statement)
                pytest.fail(f"{role} may {statement}")
    with pytest.raises(asyncpg.UndefinedColumnError):
        made.as_("reader", "SELECT salt FROM certificates")


def test_control_the_same_statements_are_none_that_postgres_would_refuse_anyway(made: Roles) -> None:
    """The list above can go red: each is a statement that whoever owns the database may run."""

    async def main() -> None:
        connection = await asyncpg.connect(made.world.dsn)
        try:
            for statement in {statement for statements in FORBIDDEN.values() for statement in statements}:
                transaction = connection.transaction()
                await transaction.start()
                await connection.execute(statement)
                await transaction.rollback()
        finally:
            await connection.close()

    blocking(main)


WALLED = ("tenants", "tenant_keys", "encryption_keys", "streams", "stream_key_history", "messages", "commands", "legal_holds")


def test_a_reader_sees_the_tenant_of_its_session_and_without_one_nothing(made: Roles) -> None:
    world = made.world
    world.run()
    world.control()
    fill(world)
    for tenant in ("acme", "zeta"):
        world.json("hold", "--tenant", tenant, "--reason", "r", "--wait", "100")
    for table in WALLED:
        query = f"SELECT DISTINCT tenant_id FROM {table} ORDER BY 1"
        assert [row[0] for row in made.as_("reader", query, tenant="acme")] == ["acme"], table
        assert [row[0] for row in made.as_("reader", query, tenant="")] == [], table
        assert [row[0] for row in made.as_("reader", query, tenant="*")] == ["acme", "zeta"], table
    receipts = "SELECT DISTINCT body -> 'scope' ->> 'tenant' FROM receipts"
    assert [row[0] for row in made.as_("reader", receipts, tenant="zeta")] == ["zeta"]
    trail = "SELECT DISTINCT tenant_ref FROM audit_log"
    assert [row[0] for row in made.as_("reader", trail, tenant="zeta")] == [tenant_ref("zeta")]


def test_a_role_that_may_not_make_roles_is_told_so(made: Roles) -> None:
    document = json.loads(made.world.config.read_text())
    document["postgres"]["dsn_migrator"] = made.dsn("reader")
    made.world.config.write_text(json.dumps(document))
    denied = made.world.cli("db", "roles", "--prefix", made.prefix)
    assert (denied.returncode, b"this role may not do that" in denied.stderr) == (3, True)
    refused = made.world.cli("db", "roles", "--prefix", "x; DROP TABLE messages")
    assert refused.returncode == 2
    printed = made.world.cli("db", "roles", "--prefix", made.prefix, "--print").stdout.decode()
    assert (
        f"GRANT DELETE ON messages, stream_key_history, quarantined_keys, residue, erased_refs, shred_barriers, foretold, blind_index "
        f"TO {made.prefix}_control;" in printed
    )


def test_a_reader_of_one_tenant_is_not_told_that_the_database_lacks_what_befell_another(made: Roles) -> None:
    """It sees of the ledger which entries there are, and nothing of what they say."""
    world = made.world
    world.run()
    world.control()
    fill(world)
    assert world.json("shred", "--tenant", "zeta", "--reason", "r", "--yes", "--wait", "100")["status"] == "inaccessible"
    document = json.loads(world.config.read_text())
    document["postgres"]["dsn_reader"] = made.dsn("reader", f"search_path={made.prefix}_reader,public&sidecar.tenant=acme")
    world.config.write_text(json.dumps(document))
    assert {event["status"] for event in world.json("events", "list", "--tenant", "acme")} == {"ok"}
    assert world.json("ledger", "status")["serves"]
    (entry,) = made.as_("reader", "SELECT * FROM ledger", tenant="acme")
    assert set(entry.keys()) == {"seq", "entry_id", "created_at", "published_at"}
