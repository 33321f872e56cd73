"""`sidecar dlq`: records that could not be stored."""

from typing import Any

import typer

from sidecar.cli.context import cli, fail
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped

app = typer.Typer(help="Dead letters.", no_args_is_help=True)
_ROWS = """SELECT d.id, t.topic, d.source_id, d.partition, d."offset", d.reason, d.tenant_id, d.value_sha256, d.value_encrypted IS NOT NULL AS sealed, d.at
FROM dead_letters d LEFT JOIN source_topics t USING (source_id) WHERE $1::bigint IS NULL OR d.id = $1 ORDER BY d.id DESC LIMIT 1000"""


async def _rows(connection: Connection, id: int | None = None) -> list[dict[str, Any]]:
    with mapped():
        return [dict(row) for row in await connection.fetch(_ROWS, id)]


@app.command("list")
def list_(context: typer.Context) -> None:
    """The newest thousand: where they stand in the source topic, and why. Their values are not shown."""
    here = cli(context)
    here.show(here.ask("reader", _rows))


@app.command()
def show(context: typer.Context, id: int) -> None:
    """One dead letter."""
    here = cli(context)
    rows = here.ask("reader", lambda connection: _rows(connection, id))
    if not rows:
        fail(f"error: there is no dead letter {id}")
    here.show(rows[0])
