"""10,000 forged, replayed, expired and foreign commands on the control topic: none is executed, each is answered, and good ones come through."""

# ruff: noqa: ASYNC110 (what is waited for happens in another process)

import asyncio
import base64
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest

from sidecar.core import dsse
from sidecar.core.command import PAYLOAD_TYPE
from sidecar.core.dsse import Signer
from sidecar.core.model import Scope, ScopeKind
from sidecar.postgres import audit, migrations
from sidecar.postgres.connection import Connection, connect
from sidecar.settings import Settings, load
from sidecar.testing import control_plane as kit
from sidecar.testing.local_stack import LocalStack

ACME, ZETA = Scope.of_tenant("acme"), Scope.of_tenant("zeta")
STREAMS = 20
BROKEN = """
from datetime import timedelta
from sidecar.core import authority, command
authority.Authority.signers = lambda self, signed: list(self.issuers)[:1]
command._check_here_and_now = lambda *_: None
"""
"""A control plane that believes every signature, address and date."""


@dataclass(frozen=True)
class World:
    config: Path
    settings: Settings
    database: Connection
    dpo: Signer
    stranger: Signer

    def forged(self, number: int) -> tuple[UUID, bytes]:
        """In turn: by a stranger, under the key id of a listed issuer, a good signature over another payload, none at all."""
        command_id, value = kit.command(self.settings, "shred", ACME, signers=[self.stranger])
        envelope = json.loads(value)
        if number % 4 == 1:
            envelope["signatures"][0]["keyid"] = self.dpo.key_id
        if number % 4 == 2:
            envelope["signatures"] = dsse.sign(PAYLOAD_TYPE, b"{}", [self.dpo]).to_json()["signatures"]
        if number % 4 == 3:
            return command_id, base64.b64decode(envelope["payload"])
        return command_id, json.dumps(envelope).encode()

    def expired(self) -> tuple[UUID, bytes]:
        past = datetime.now(UTC) - timedelta(hours=1)
        times = {"issued_at": (past - timedelta(hours=1)).isoformat(), "not_after": past.isoformat()}
        return kit.command(self.settings, "shred", ACME, signers=[self.dpo], **times)

    def foreign(self, number: int) -> tuple[UUID, bytes]:
        """For another deployment, or for a tenant that the issuer may not speak for."""
        if number % 2:
            return kit.command(self.settings, "shred", ACME, signers=[self.dpo], audience="production")
        return kit.command(self.settings, "shred", ZETA, signers=[self.dpo])

    def good(self, number: int) -> tuple[UUID, bytes]:
        scope = Scope(tenant="acme", kind=ScopeKind.STREAM, id=f"s{number}")
        return kit.command(self.settings, "rotate", scope, signers=[self.dpo])


@pytest.fixture
async def world(local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]) -> AsyncIterator[World]:
    name = unique("f")
    dpo, listed = kit.issuer("dpo", tenants=["acme"])
    topics = {part: f"{name}.{part}" for part in ("topic", "receipts", "ledger")}
    document = {
        "deployment": name,
        "kafka": {"bootstrap_servers": local_stack.bootstrap_servers},
        "postgres": {"dsn": database},
        "control": topics | {"issuers": [listed]},
        "http": {"port": 0},
    }
    config = kit.write_config(tmp_path, document)
    connection = await connect(database)
    await migrations.migrate(connection)
    await kit.seed(connection, "acme", {f"s{n}": "C" for n in range(STREAMS)})
    await kit.seed(connection, "zeta", {"a": "C"})
    yield World(config, load(config), connection, dpo, kit.issuer("stranger")[0])
    await connection.close()


async def executed(database: Connection, good: set[UUID]) -> list[UUID]:
    """The checker: what was taken for a command, or acted on, and is none of the good ones."""
    taken = {row["command_id"] for row in await database.fetch("SELECT command_id FROM commands")}
    acted = await database.fetch("SELECT details ->> 'command_id' AS id FROM audit_log WHERE action LIKE '%.shred' OR action = 'keys.rotate'")
    return sorted((taken | {UUID(row["id"]) for row in acted}) - good)


async def answered(world: World, ids: set[UUID]) -> None:
    """Each of the ids has a receipt, every receipt there is stands on the topic, and no command is under way."""
    under_way = "SELECT EXISTS (SELECT FROM receipts WHERE published_at IS NULL) OR EXISTS (SELECT FROM commands WHERE finished_at IS NULL)"
    async with asyncio.timeout(240):
        while not ids <= {row["command_id"] for row in await world.database.fetch("SELECT DISTINCT command_id FROM receipts")}:
            await asyncio.sleep(0.2)
        while await world.database.fetchval(under_way):
            await asyncio.sleep(0.2)


async def test_ten_thousand_bad_commands(world: World) -> None:
    first, replayed = world.good(0)
    bad: list[tuple[str, UUID, bytes]] = []
    for number in range(2500):
        bad.append(("forged", *world.forged(number)))
        bad.append(("replayed", first, replayed))
        bad.append(("expired", *world.expired()))
        bad.append(("foreign", *world.foreign(number)))
    good = [(first, replayed), *(world.good(number) for number in range(1, STREAMS))]
    values = [value for _, _, value in bad]
    for number, (_, value) in enumerate(good):
        values.insert(number * len(bad) // STREAMS, value)
    with kit.control(world.config):
        started = time.monotonic()
        kit.send(world.settings, *values, key="acme")  # one key, one partition: the good ones wait for the bad ones before them
        await answered(world, {command_id for _, command_id, _ in bad} | {command_id for command_id, _ in good})
        print(f"10,000 bad and {STREAMS} good commands: {time.monotonic() - started:.1f} s until all are answered")
    assert await executed(world.database, {command_id for command_id, _ in good}) == []
    assert {r["state"] for r in await world.database.fetch("SELECT state FROM tenants")} == {"active"}
    assert await world.database.fetchval("SELECT count(*) FROM encryption_keys WHERE NOT is_active") == STREAMS
    assert await world.database.fetchval("SELECT epoch FROM tenants WHERE tenant_id = 'acme'") == 1 + STREAMS, "the replayed one was carried out once"
    receipts = kit.published(world.settings)
    codes = Counter(r["error"]["code"] for r in receipts if r["status"] == "rejected")
    assert codes == {
        "unknown_issuer": 625,
        "bad_signature": 1250,
        "unsigned": 625,
        "expired": 2500,
        "wrong_audience": 1250,
        "not_permitted": 1250,
    }
    done = Counter(r["command_id"] for r in receipts if r["status"] == "done")
    assert {UUID(i) for i in done} == {command_id for command_id, _ in good}
    again = Counter(r["status"] for r in receipts if r["command_id"] == str(first))
    assert again.total() == 2 + 2500, "each of the replays is answered with the receipt that there is"
    assert [problem async for _, _, problem in audit.verify(world.database)] == [None]


async def test_control_a_control_plane_that_believes_everything_executes_them(world: World) -> None:
    """The checker can go red."""
    bad = [world.forged(0), world.forged(1), world.expired(), world.foreign(0), world.foreign(1)]
    with kit.control(world.config, broken=BROKEN):
        kit.send(world.settings, *(value for _, value in bad), key="acme")
        await answered(world, {command_id for command_id, _ in bad})
    assert len(await executed(world.database, set())) == 5 - 1, "all but the one for a tenant that the believed issuer may not speak for"
    assert await world.database.fetchval("SELECT state FROM tenants WHERE tenant_id = 'acme'") == "shredded"
