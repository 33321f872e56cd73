"""`sidecar receipts`: what became of commands."""

from typing import Annotated, Any
from uuid import UUID

import typer

from sidecar.cli.context import Exit, cli, fail, run_async
from sidecar.postgres import commands, residue
from sidecar.postgres.connection import connected
from sidecar.residue import live

app = typer.Typer(help="What became of commands.", no_args_is_help=True)

COLUMNS = ("receipt_id", "command_id", "op", "scope", "status", "error", "accepted_at", "inaccessible_at")


def as_id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no id") from None


@app.command("list")
def list_(context: typer.Context, command: Annotated[str | None, typer.Option(help="Only those of this command.")] = None) -> None:
    """Every receipt, newest last."""
    settings = cli(context).settings
    wanted = as_id(command) if command else None

    async def read() -> list[dict[str, Any]]:
        async with connected(settings.postgres.for_role("reader")) as connection:
            return await commands.receipts(connection, command_id=wanted)

    cli(context).show(run_async(read()), COLUMNS)


@app.command()
def get(context: typer.Context, identity: Annotated[str, typer.Argument(metavar="ID", help="A receipt's id, or a command's.")]) -> None:
    """One receipt; for a command its newest, with a shred's residue as it stands now."""
    settings = cli(context).settings
    wanted = as_id(identity)

    async def read() -> dict[str, Any] | None:
        async with connected(settings.postgres.for_role("reader")) as connection:
            found = await commands.receipt(connection, wanted)
            if found is None or found["command_id"] != str(wanted) or found["status"] != "inaccessible":
                return found
            return live(found, await residue.of_command(connection, wanted))

    found = run_async(read())
    if found is None:
        fail(f"there is no receipt {wanted}, and none of a command with this id", Exit.FAILED)
    cli(context).show(found)
