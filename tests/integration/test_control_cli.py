"""`rotate`, `shred`, `receipts`, `audit`, `control` as a user calls them, as processes; and SCRAM from the command to the receipt."""

# ruff: noqa: ASYNC110, ASYNC220 (what is waited for happens in another process, and it is short)

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from sidecar.postgres.connection import Connection
from sidecar.testing import control_plane as kit
from sidecar.testing import local_kafka
from sidecar.testing.local_stack import LocalStack


def sidecar(config: Path, *words: str) -> tuple[int, Any, str]:
    """-> exit code, what stdout is as JSON (None: nothing), stderr."""
    environment = dict(os.environ) | {"SIDECAR_CONFIG": str(config)}
    done = subprocess.run(
        [sys.executable, "-m", "sidecar", *words], capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, timeout=120
    )
    return done.returncode, json.loads(done.stdout) if done.stdout.strip() else None, done.stderr


def settings_of(stack: LocalStack, dsn: str, deployment: str, kafka: dict[str, Any] | None = None) -> dict[str, Any]:
    return kit.document(deployment, stack.bootstrap_servers, dsn, **({"kafka": kafka} if kafka else {}))


@pytest.fixture
async def database_with_acme(connection: Connection) -> Connection:
    await kit.seed(connection, "acme", {"a": "C", "b": "C"})
    await kit.seed(connection, "zeta", {"a": "C"})
    return connection


async def test_a_day_with_the_command_line(
    local_stack: LocalStack, database: str, database_with_acme: Connection, tmp_path: Path, unique: Callable[[str], str]
) -> None:
    config = kit.write_config(tmp_path, settings_of(local_stack, database, unique("cli")))
    with kit.control(config):
        code, receipt, _ = sidecar(config, "rotate", "--tenant", "acme", "--stream", "a", "--reason", "leak?", "--wait", "100")
        assert (code, receipt["status"], receipt["keys"]["count"], receipt["scope"]) == (
            0,
            "done",
            1,
            {"tenant": "acme", "kind": "stream", "id": "a"},
        )
        code, published, _ = sidecar(config, "rotate", "--tenant", "acme", "--class", "C", "--reason", "leak?")
        assert (code, list(published)) == (0, ["command_id"])
        code, receipt, _ = sidecar(config, "shred", "--tenant", "acme", "--reason", "Art. 17", "--yes", "--wait", "100", "--ticket", "GDPR-1")
        assert (code, receipt["status"]) == (0, "inaccessible")
        shredded = receipt["command_id"]
        code, receipt, error = sidecar(config, "rotate", "--tenant", "nobody", "--reason", "r", "--wait", "100", "-o", "json")
        assert (code, receipt["error"]["code"]) == (1, "unknown_tenant")
        assert "unknown_tenant" in error
        code, receipts, _ = sidecar(config, "receipts", "list", "--command", shredded)
        assert (code, [r["status"] for r in receipts]) == (0, ["accepted", "inaccessible"])
        got = sidecar(config, "receipts", "get", shredded)[1]
        moves_on = {"residue", "irrecoverable_at", "irrecoverable_reason"}  # `get` shows what is left as it stands now
        assert {n: v for n, v in got.items() if n not in moves_on} == {n: v for n, v in receipts[1].items() if n not in moves_on}
        assert sidecar(config, "receipts", "get", receipts[0]["receipt_id"])[1] == receipts[0]
        assert len(sidecar(config, "receipts", "list")[1]) == 7
        assert sidecar(config, "receipts", "get", str(uuid4()))[0] == 1
        assert sidecar(config, "receipts", "get", "what")[0] == 2
        code, rows, _ = sidecar(config, "audit", "tail", "--limit", "3")
        assert (code, len(rows)) == (0, 3)
        assert set(rows[0]) == {"writer", "seq", "at", "action", "actor", "tenant_ref", "details", "prev_hash", "hash"}
        assert len(bytes.fromhex(rows[0]["hash"])) == 32
        code, found, _ = sidecar(config, "audit", "verify")
        assert (code, [(row["writer"], row["seq"], row["ok"], row["problem"]) for row in found]) == (0, [("control-0", rows[-1]["seq"], True, None)])
        assert set(found[0]) == {"writer", "seq", "ok", "problem", "covered_seq", "covered_at", "uncovered_since"}
    await database_with_acme.execute("DELETE FROM audit_log WHERE seq = 2")
    code, found, _ = sidecar(config, "audit", "verify")
    assert (code, found[0]["ok"]) == (1, False)
    assert await database_with_acme.fetchval("SELECT state FROM tenants WHERE tenant_id = 'zeta'") == "active"
    assert await database_with_acme.fetchval("SELECT issuer FROM commands WHERE command_id = $1", UUID(shredded)) != ""


async def test_what_the_command_line_refuses_before_it_sends_anything(
    local_stack: LocalStack, database: str, database_with_acme: Connection, tmp_path: Path, unique: Callable[[str], str]
) -> None:
    config = kit.write_config(tmp_path, settings_of(local_stack, database, unique("cli")))
    for words in (
        ("shred", "--tenant", "acme", "--reason", "r"),  # nobody there to confirm
        ("shred", "--tenant", "acme", "--stream", "a", "--class", "C", "--reason", "r", "--yes"),
        ("shred", "--tenant", "../etc", "--reason", "r", "--yes"),
        ("shred", "--tenant", "acme", "--stream", "a\nb", "--reason", "r", "--yes"),
        ("shred", "--tenant", "acme", "--reason", " ", "--yes"),
        ("shred", "--tenant", "acme", "--yes"),
        ("rotate", "--reason", "r"),
    ):
        code, out, error = sidecar(config, *words)
        assert (code, out) == (2, None), words
        assert error.strip()
    assert "--yes" in sidecar(config, "shred", "--tenant", "acme", "--reason", "r")[2]


async def test_a_command_that_nobody_carries_out_is_pending(
    local_stack: LocalStack, database: str, database_with_acme: Connection, tmp_path: Path, unique: Callable[[str], str]
) -> None:
    config = kit.write_config(tmp_path, settings_of(local_stack, database, unique("cli")))
    code, out, error = sidecar(config, "shred", "--tenant", "acme", "--reason", "r", "--yes", "--wait", "0.2")
    assert (code, list(out)) == (4, ["command_id"])
    assert out["command_id"] in error
    with kit.control(config):
        async with asyncio.timeout(120):
            while sidecar(config, "receipts", "get", out["command_id"])[1] is None:
                await asyncio.sleep(0.1)


async def test_the_control_command_says_ready_and_stops_with_0(
    local_stack: LocalStack, database: str, database_with_acme: Connection, tmp_path: Path, unique: Callable[[str], str]
) -> None:
    config = kit.write_config(tmp_path, settings_of(local_stack, database, unique("cli")))
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen([sys.executable, "-m", "sidecar", "control", "--config", str(config)], stderr=stderr)
    control = kit.ControlProcess(process, log)
    try:
        control.wait_ready()
        assert control.stop() == 0
    finally:
        control.kill()
    assert database.rpartition("@")[2] not in log.read_text()  # no DSN in the log


async def test_everything_goes_over_scram(
    local_stack: LocalStack, database: str, database_with_acme: Connection, tmp_path: Path, unique: Callable[[str], str]
) -> None:
    if local_stack.credentials_file is None:
        pytest.skip("the broker that was given has no SCRAM listener that we know of")
    user, password = next(iter(json.loads(local_stack.credentials_file.read_text()).items()))
    secret = tmp_path / "password"
    secret.write_text(password)
    security = {"protocol": "SASL_PLAINTEXT", "mechanism": local_kafka.MECHANISM, "username": user, "password_file": str(secret)}
    kafka = {"bootstrap_servers": local_stack.sasl_bootstrap_servers, "security": security}
    config = kit.write_config(tmp_path, settings_of(local_stack, database, unique("scram"), kafka))
    with kit.control(config) as process:
        code, receipt, _ = sidecar(config, "shred", "--tenant", "acme", "--reason", "r", "--yes", "--wait", "100")
        assert (code, receipt["status"]) == (0, "inaccessible")
        assert password not in process.log.read_text()
