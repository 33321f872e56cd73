"""`sidecar audit`: the trail of key operations and commands."""

from dataclasses import fields
from typing import Annotated, Any

import typer

from sidecar.cli.context import Exit, cli, fail, run_async
from sidecar.core.audit import AuditRow
from sidecar.postgres import audit
from sidecar.postgres.connection import connected

app = typer.Typer(help="The trail of key operations and commands.", no_args_is_help=True)

COLUMNS = ("writer", "seq", "at", "action", "actor", "details")


def _shown(row: AuditRow) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in fields(row)}


@app.command()
def tail(context: typer.Context, limit: Annotated[int, typer.Option(min=1, help="How many.")] = 20) -> None:
    """The newest rows, newest last; bytes in hex."""
    settings = cli(context).settings

    async def read() -> list[dict[str, Any]]:
        async with connected(settings.postgres.for_role("reader")) as connection:
            return [_shown(row) for row in await audit.read(connection, limit=limit)]

    cli(context).show(run_async(read()), COLUMNS)


@app.command()
def verify(context: typer.Context) -> None:
    """Recompute each writer's chain. Exit 1 if a row was changed or one in the middle is missing."""
    settings = cli(context).settings

    async def read() -> list[dict[str, Any]]:
        async with connected(settings.postgres.for_role("reader")) as connection:
            return [
                {"writer": writer, "seq": newest, "ok": problem is None, "problem": problem}
                async for writer, newest, problem in audit.verify(connection)
            ]

    found = run_async(read())
    cli(context).show(found, ("writer", "seq", "ok", "problem"))
    if not all(entry["ok"] for entry in found):
        fail("the audit trail is broken", Exit.FAILED)
