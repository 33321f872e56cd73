"""Audit checkpoints on a real database and topic: what `sidecar audit verify` finds, and what it says of rows that none covers yet."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from sidecar import checkpoints
from sidecar.checkpoints import Checkpoints
from sidecar.core.dsse import Signer, key_id
from sidecar.core.errors import BrokerUnavailable, ConfigurationError
from sidecar.kafka import journal
from sidecar.kafka.admin import Admin
from sidecar.kafka.receipts import ViewRecord, ViewWriter
from sidecar.postgres import audit, migrations
from sidecar.postgres.connection import Connection, Pool, connect, open_pool
from sidecar.settings import Settings, load
from sidecar.signing import create_signing_key
from sidecar.testing import control_plane as kit
from sidecar.testing.local_stack import LocalStack

START = datetime(2026, 11, 24, 12, tzinfo=UTC)


@dataclass
class Trail:
    settings: Settings
    pool: Pool
    database: Connection
    signer: Signer
    now: datetime = START

    async def rows(self, writer: str, count: int) -> None:
        async with self.database.transaction():
            for n in range(count):
                self.now += timedelta(seconds=1)
                await audit.append(
                    self.database, writer=writer, at=self.now, action="shred", actor="dpo@example.org", tenant="acme", details={"n": n, "of": writer}
                )

    async def checkpoint(self, signer: Signer | None = None) -> bool:
        now = self.now

        class Clock:
            def now(self) -> datetime:
                return now

        return await Checkpoints(self.settings, self.pool, signer or self.signer, ViewWriter(self.settings), Clock()).sign()

    async def rows_of_verify(self, *, keys: list[Signer] | None = None, offline: bool = False) -> list[dict[str, Any]]:
        public = [signer.public for signer in ([self.signer] if keys is None else keys)]
        return await checkpoints.verify(self.settings, self.database, {key_id(k): k for k in public}, offline=offline)

    async def verify(self, **options: Any) -> dict[str | None, dict[str, Any]]:
        return {row["writer"]: row for row in await self.rows_of_verify(**options)}

    async def problems(self, **options: Any) -> list[str]:
        return [row["problem"] for row in await self.rows_of_verify(**options) if not row["ok"]]

    async def execute(self, statement: str, *arguments: Any) -> None:
        await self.database.execute(statement, *arguments)

    def publish(self, key: bytes, value: bytes) -> None:
        ViewWriter(self.settings).write([ViewRecord(topic=self.settings.audit.topic, partition=0, key=key, value=value)])


@pytest.fixture
async def trail(local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]) -> AsyncIterator[Trail]:
    deployment = unique("a")
    config = {
        "deployment": deployment,
        "kafka": {"bootstrap_servers": local_stack.bootstrap_servers},
        "postgres": {"dsn": database},
        "audit": {"topic": f"{deployment}.audit"},
    }
    settings = load(kit.write_config(tmp_path, config))
    Admin(settings).create(settings.audit.topic, 1, journal.FOR_EVER)
    connection = await connect(database)
    await migrations.migrate(connection)
    pool = await open_pool(database)
    found = Trail(settings, pool, connection, create_signing_key(tmp_path / "keys" / "own"))
    await found.rows("control-0", 6)
    await found.rows("one", 3)
    yield found
    await pool.close()
    await connection.close()


async def test_checkpoint_covers_what_stands_and_verify_says_since_when_rows_are_not_covered(trail: Trail) -> None:
    before = await trail.verify()
    assert before["one"]["covered_seq"] is None and before["one"]["uncovered_since"] == START + timedelta(seconds=7)
    assert await trail.checkpoint()
    await trail.rows("control-0", 2)
    await trail.rows("new", 1)
    found = await trail.verify()
    assert all(row["ok"] for row in found.values())
    assert (found["control-0"]["seq"], found["control-0"]["covered_seq"]) == (8, 6)
    assert found["control-0"]["covered_at"] == START + timedelta(seconds=6)
    assert found["control-0"]["uncovered_since"] == START + timedelta(seconds=10)
    assert (found["one"]["covered_seq"], found["one"]["uncovered_since"]) == (3, None)
    assert (found["new"]["covered_seq"], found["new"]["uncovered_since"]) == (None, START + timedelta(seconds=12))


async def test_checkpoint_that_is_made_while_verify_reads_is_no_fault(trail: Trail, monkeypatch: pytest.MonkeyPatch) -> None:
    read, loop = journal.read, asyncio.get_running_loop()

    def meanwhile(settings: Settings, topic: str) -> Iterator[Any]:
        assert asyncio.run_coroutine_threadsafe(trail.checkpoint(), loop).result(60)
        return read(settings, topic)

    monkeypatch.setattr(journal, "read", meanwhile)
    assert await trail.problems() == []
    await trail.rows("one", 1)
    await trail.execute("DELETE FROM audit_checkpoints")  # control: one that was removed is
    [problem] = await trail.problems()
    assert "is not in the database any more" in problem


async def test_checkpoint_is_made_only_when_a_chain_has_moved(trail: Trail) -> None:
    assert await trail.checkpoint()
    assert not await trail.checkpoint()
    await trail.rows("one", 1)
    assert await trail.checkpoint()
    assert await trail.database.fetchval("SELECT count(*) FROM audit_checkpoints WHERE published_at IS NOT NULL") == 2
    assert len(list(journal.read(trail.settings, trail.settings.audit.topic))) == 2


async def test_trail_without_any_row_has_no_checkpoint_and_verifies(trail: Trail) -> None:
    await trail.execute("TRUNCATE audit_log")
    assert not await trail.checkpoint()
    assert await trail.verify() == {}


async def change(trail: Trail) -> None:
    await trail.execute("UPDATE audit_log SET actor = 'nobody' WHERE writer = 'control-0' AND seq = 4")


async def remove(trail: Trail) -> None:
    await trail.execute("DELETE FROM audit_log WHERE writer = 'control-0' AND seq = 3")


async def reorder(trail: Trail) -> None:
    await trail.execute("UPDATE audit_log SET seq = CASE seq WHEN 2 THEN 103 ELSE 102 END WHERE writer = 'control-0' AND seq IN (2, 3)")
    await trail.execute("UPDATE audit_log SET seq = seq - 100 WHERE writer = 'control-0' AND seq > 100")


async def truncate(trail: Trail) -> None:
    await trail.execute("DELETE FROM audit_log WHERE writer = 'control-0' AND seq > 4")


async def truncate_all(trail: Trail) -> None:
    await trail.execute("DELETE FROM audit_log WHERE writer = 'control-0'")


async def rewrite(trail: Trail) -> None:
    """From row 5 on another story, and hashes that fit it."""
    await truncate(trail)
    await trail.rows("control-0", 2)


DAMAGE: list[tuple[Callable[[Trail], Awaitable[None]], str, bool]] = [
    # damage, what is said of it, whether the chain alone shows it
    (change, "row 4 was changed", True),
    (remove, "row 3 is missing", True),
    (reorder, "row 2 was changed", True),
    (truncate, "rows 5 to 6, which a checkpoint signed, were removed from the end", False),
    (truncate_all, "rows 1 to 6, which a checkpoint signed, were removed from the end", False),
    (rewrite, "row 6 is not the one that a checkpoint signed", False),
]


@pytest.mark.parametrize(("damage", "said", "chain_shows"), DAMAGE, ids=[damage.__name__ for damage, _, _ in DAMAGE])
async def test_damage_to_the_trail_is_found(trail: Trail, damage: Callable[[Trail], Awaitable[None]], said: str, chain_shows: bool) -> None:
    await trail.checkpoint()
    assert await trail.problems() == [], "control: nothing is wrong yet"
    await damage(trail)
    assert await trail.problems() == [f"writer control-0: {said}"]
    assert [bool(problem) async for _, _, problem in audit.verify(trail.database)] == ([True, False] if chain_shows else [False] * 2)[
        : 1 if damage is truncate_all else 2
    ]


async def test_removal_behind_the_newest_checkpoint_does_not_show_and_was_named_as_uncovered(trail: Trail) -> None:
    await trail.checkpoint()
    await trail.rows("control-0", 2)
    assert (await trail.verify())["control-0"]["uncovered_since"] is not None
    await trail.execute("DELETE FROM audit_log WHERE writer = 'control-0' AND seq = 8")
    assert await trail.problems() == []


async def test_removal_of_rows_and_of_their_checkpoints_shows_against_the_topic(trail: Trail) -> None:
    await trail.checkpoint()
    await trail.rows("control-0", 2)
    await trail.checkpoint()
    await trail.execute("DELETE FROM audit_log WHERE writer = 'control-0' AND seq > 6")
    await trail.execute("DELETE FROM audit_checkpoints WHERE checkpoint_id = (SELECT max(checkpoint_id) FROM audit_checkpoints)")
    assert await trail.problems(offline=True) == [], "control: the database alone does not show it"
    found = await trail.problems()
    assert "writer control-0: rows 7 to 8, which a checkpoint signed, were removed from the end" in found
    assert any("is not in the database any more" in problem for problem in found)


async def test_checkpoint_that_was_taken_from_the_topic_shows(trail: Trail) -> None:
    await trail.checkpoint()
    Admin(trail.settings).delete_records({(trail.settings.audit.topic, 0): 1})
    assert await trail.problems() == [f"checkpoint 1 of the database is not on the topic {trail.settings.audit.topic} any more"]
    await trail.rows("one", 1)
    await trail.checkpoint()
    assert len(await trail.problems()) == 1, "what stands behind the deleted ones is still read"


async def test_checkpoint_that_was_changed_or_signed_by_somebody_else_does_not_verify(trail: Trail, tmp_path: Path) -> None:
    stranger = create_signing_key(tmp_path / "stranger")
    await trail.checkpoint()
    [envelope] = [row["envelope"] for row in await trail.database.fetch("SELECT envelope FROM audit_checkpoints")]
    assert "does not verify: it was signed with a key" in (await trail.problems(keys=[stranger], offline=True))[0]
    assert await trail.problems(keys=[stranger, trail.signer]) == [], "of several keys one must fit"

    at = envelope.index(b'"payload":"') + 40
    forged = envelope[:at] + bytes([envelope[at] ^ 1]) + envelope[at + 1 :]
    await trail.execute("UPDATE audit_checkpoints SET envelope = $1", forged)
    found = await trail.problems(offline=True)
    assert len(found) == 1 and "does not verify" in found[0]
    assert (await trail.verify(offline=True))["control-0"]["covered_seq"] is None, "what a forged one says does not count"


async def test_checkpoint_of_a_stranger_on_the_topic_does_not_count_and_is_named(trail: Trail, tmp_path: Path) -> None:
    """Somebody removes rows and writes a checkpoint that fits, with a key of their own."""
    await trail.checkpoint()
    await truncate(trail)
    await trail.checkpoint(create_signing_key(tmp_path / "stranger"))
    found = await trail.problems(offline=True)
    assert "writer control-0: rows 5 to 6, which a checkpoint signed, were removed from the end" in found
    assert any("checkpoint 2 of the database does not verify" in problem for problem in found)


async def test_checkpoints_of_another_deployment_on_the_same_topic_are_not_ours(trail: Trail) -> None:
    await trail.checkpoint()
    trail.publish(b"another", b"whatever")
    assert await trail.problems() == []
    trail.publish(trail.settings.deployment.encode(), b"whatever")
    assert len(await trail.problems()) == 1, "control: under our name it is"


async def test_two_checkpoints_that_contradict_each_other_show(trail: Trail) -> None:
    """Rows that were removed and written anew between two checkpoints of the true signer."""
    await trail.checkpoint()
    await truncate(trail)
    await trail.rows("control-0", 2)
    await trail.rows("one", 1)
    await trail.checkpoint()
    found = await trail.problems()
    assert any("two checkpoints signed different rows 6 of writer control-0" in problem for problem in found)


async def test_verify_does_not_pass_when_the_topic_cannot_be_read(trail: Trail) -> None:
    await trail.checkpoint()
    kafka = trail.settings.kafka.model_copy(update={"bootstrap_servers": "127.0.0.1:1"})
    trail.settings = trail.settings.model_copy(update={"kafka": kafka})
    with pytest.raises(BrokerUnavailable):
        await trail.verify()
    assert await trail.problems(offline=True) == []


async def test_reader_who_sees_only_a_part_of_the_trail_cannot_verify_it(trail: Trail) -> None:
    """As `sidecar db roles` makes it: views in a schema of the readers'. A part would look broken, or, empty, whole."""
    await trail.checkpoint()
    await trail.execute("CREATE SCHEMA walled")
    await trail.execute(
        "CREATE VIEW walled.audit_log AS SELECT * FROM public.audit_log WHERE current_setting('sidecar.tenant', true) = '*' OR writer = 'one'"
    )
    await trail.execute("SET search_path = walled, public")
    for tenant in (None, "acme"):
        if tenant is not None:
            await trail.execute(f"SET sidecar.tenant = '{tenant}'")
        with pytest.raises(ConfigurationError, match="only a part"):
            await trail.verify(offline=True)
    await trail.execute("SET sidecar.tenant = '*'")
    assert await trail.problems(offline=True) == []
