"""`sidecar keys`: names and states of keys; no bytes of any."""

from typing import Annotated, Any

import typer

from sidecar.cli.context import cli, run_async
from sidecar.postgres.connection import connected
from sidecar.postgres.errors import mapped

app = typer.Typer(help="Keys, by name.", no_args_is_help=True)

# A DEK is gone with its tenant's KEK. Uses of a stream's key are the positions it sealed.
_KEYS = """
SELECT k.key_id, k.key_version, k.scope_kind, k.scope_id,
  CASE WHEN k.is_destroyed OR t.state <> 'active' OR k.generation < t.generation THEN 'destroyed' WHEN k.is_active THEN 'active' ELSE 'retired' END AS state,
  k.created_at,
  CASE WHEN k.scope_kind = 'stream' THEN coalesce((SELECT sum(coalesce(h.used_to_position,
      (SELECT max(m.stream_position) FROM messages m WHERE m.tenant_id = h.tenant_id AND m.stream_id = h.stream_id)) - h.used_from_position + 1)
    FROM stream_key_history h WHERE h.tenant_id = k.tenant_id AND h.stream_id = k.scope_id AND h.key_id = k.key_id AND h.key_version = k.key_version), 0)::bigint
    ELSE k.uses_reserved END AS uses
FROM encryption_keys k JOIN tenants t USING (tenant_id)
WHERE k.tenant_id = $1 ORDER BY k.scope_kind, k.scope_id, k.key_version"""


@app.command("list")
def list_(context: typer.Context, tenant: Annotated[str, typer.Option(help="The tenant.")]) -> None:
    """Every key version of a tenant."""
    here = cli(context)

    async def main() -> list[dict[str, Any]]:
        async with connected(here.settings.postgres.for_role("reader")) as connection:
            with mapped():
                return [dict(row) for row in await connection.fetch(_KEYS, tenant)]

    here.show(run_async(main()))
