"""`sidecar status`: lag, instances, keys due, pending commands at a glance."""

import asyncio
from typing import Any

import typer

from sidecar.cli.context import Cli, cli, run_async
from sidecar.core.errors import BrokerUnavailable
from sidecar.kafka.admin import Admin
from sidecar.postgres.connection import connected
from sidecar.postgres.errors import mapped
from sidecar.postgres.rotations import LIVE_KEYS

_DUE = f"""
SELECT count(DISTINCT (k.tenant_id, k.key_id, k.key_version)) FROM ({LIVE_KEYS}) k JOIN tenants t USING (tenant_id, generation)
CROSS JOIN LATERAL (SELECT p.key_rotation_interval_days AS days FROM encryption_policies p
  WHERE p.tenant_id IN (k.tenant_id, '*') AND p.stream_type_class = k.class ORDER BY (p.tenant_id = '*') LIMIT 1) p
WHERE t.state = 'active' AND p.days IS NOT NULL AND k.created_at < now() - make_interval(days => p.days)"""  # noqa: S608 (constants)

_LEASES = """
SELECT t.topic, t.topic_id, l.partition, l.next_offset, l.owner FROM partition_leases l JOIN source_topics t USING (source_id) ORDER BY 1, 3"""


async def _status(here: Cli) -> dict[str, Any]:
    async with connected(here.settings.postgres.for_role("reader")) as connection:
        with mapped():
            instances = await connection.fetch("SELECT instance_id, state, heartbeat_at FROM instances ORDER BY 1")
            leases = await connection.fetch(_LEASES)
            pending = await connection.fetch(
                "SELECT command_id, op, tenant_id, status, step FROM commands WHERE finished_at IS NULL ORDER BY received_at"
            )
            due = await connection.fetchval(_DUE)
            tenants = await connection.fetch("SELECT state, count(*) AS tenants FROM tenants GROUP BY state ORDER BY state")
    return {
        "partitions": await asyncio.to_thread(_lag, here, leases),
        "instances": [dict(row) for row in instances],
        "keys_due": due,
        "pending_commands": [dict(row) for row in pending],
        "tenants": {row["state"]: row["tenants"] for row in tenants},
    }


def _lag(here: Cli, leases: list[Any]) -> list[dict[str, Any]]:
    """Records between what is stored and the log end; null where the broker does not say."""
    ends: dict[str, dict[int, int]] = {}
    try:
        admin = Admin(here.settings)
        found = admin.describe({row["topic"] for row in leases})
        ends = admin.offsets({name: info.partitions for name, info in found.items()})
        leases = [row for row in leases if row["topic"] in found and found[row["topic"]].topic_id == row["topic_id"]]
    except BrokerUnavailable:
        pass
    out = []
    for row in leases:
        end = ends.get(row["topic"], {}).get(row["partition"])
        lag = None if end is None else max(0, end - row["next_offset"])
        out.append({"topic": row["topic"], "partition": row["partition"], "owner": row["owner"], "stored_to": row["next_offset"], "lag": lag})
    return out


def status(context: typer.Context) -> None:
    """Lag, instances, keys due for rotation, pending commands."""
    here = cli(context)
    found = run_async(_status(here))
    if here.as_json:
        here.show(found)
        return
    for name, value in found.items():
        typer.echo(f"\n{name}")
        here.show(value if isinstance(value, list | dict) else {name: value})


def add_to(app: typer.Typer) -> None:
    app.command()(status)
