"""How long `audit verify` takes over a long trail."""

import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from sidecar import checkpoints
from sidecar.core import checkpoint
from sidecar.core.audit import GENESIS, canonical, link, tenant_ref
from sidecar.core.dsse import key_id
from sidecar.postgres.connection import Connection, connected
from sidecar.postgres.signed_heads import add, heads
from sidecar.settings import Settings
from sidecar.signing import create_signing_key
from tests.benchmarks.throughput import Bench

CHUNK = 20_000
INSERT = """
INSERT INTO audit_log (writer, seq, at, action, actor, tenant_ref, details, prev_hash, hash)
SELECT $1, seq, at, action, actor, ref, details::jsonb, prev, hash
FROM unnest($2::bigint[], $3::timestamptz[], $4::text[], $5::text[], $6::bytea[], $7::text[], $8::bytea[], $9::bytea[])
  x(seq, at, action, actor, ref, details, prev, hash)"""
START = datetime(2026, 11, 24, tzinfo=UTC)


async def seed(connection: Connection, rows: int, writers: int) -> None:
    """Chains as they come: a control plane's commands, and batches that name the keys they made."""
    scope = {"kind": "tenant", "ref": tenant_ref("acme").hex()}
    command_ids = [str(UUID(int=n)) for n in range(100)]
    for number in range(writers):
        writer, prev, chunk = f"writer-{number}", GENESIS, []
        for seq in range(1, rows // writers + 1):
            details: dict[str, Any] = {"command_id": command_ids[seq % 100], "scope": scope, "count": seq % 7, "keys": [f"{UUID(int=seq)}/1"]}
            row = link(
                prev, writer=writer, seq=seq, at=START + timedelta(milliseconds=seq), action="tenant.shred", actor="dpo@example.org",
                tenant_ref=tenant_ref("acme"), details=details,
            )  # fmt: skip
            chunk.append((row.seq, row.at, row.action, row.actor, row.tenant_ref, canonical(details).decode(), row.prev_hash, row.hash))
            prev = row.hash
            if len(chunk) == CHUNK or seq == rows // writers:
                await connection.execute(INSERT, writer, *(list(column) for column in zip(*chunk, strict=True)))
                chunk = []
    await connection.execute("ANALYZE audit_log")


async def verify_seconds(bench: Bench, rows: int, writers: int = 4) -> dict[str, Any]:
    dsn = await bench.database()
    settings = Settings(deployment="bench")
    try:
        with tempfile.TemporaryDirectory() as folder:
            signer = create_signing_key(Path(folder) / str(uuid4()))
        async with connected(dsn) as connection:
            await seed(connection, rows, writers)
            signed = await heads(connection)
            await add(connection, START, signed, checkpoint.sign(settings.deployment, START, signed, signer).to_bytes())
            started = time.perf_counter()
            found = await checkpoints.verify(settings, connection, {key_id(signer.public): signer.public}, offline=True)
            seconds = time.perf_counter() - started
    finally:
        await bench.drop(dsn)
    if len(found) != writers or not all(row["ok"] and row["uncovered_since"] is None for row in found):
        raise RuntimeError("a whole trail did not verify")
    return {f"verify of {rows:,} audit rows s": seconds}
