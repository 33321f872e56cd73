"""`sidecar receipts`: what became of commands."""

from typing import Annotated, Any
from uuid import UUID

import typer

from sidecar.cli.context import Exit, cli, fail
from sidecar.postgres import commands, residue
from sidecar.postgres.connection import Connection
from sidecar.residue import live

app = typer.Typer(help="What became of commands.", no_args_is_help=True)

COLUMNS = ("receipt_id", "command_id", "op", "scope", "status", "error", "accepted_at", "inaccessible_at")


def as_id(text: str) -> UUID:
    """Raises typer.BadParameter."""
    try:
        return UUID(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no id") from None


@app.command("list")
def list_(context: typer.Context, command: Annotated[str | None, typer.Option(help="Only those of this command.")] = None) -> None:
    """Every receipt, newest last."""
    here = cli(context)
    wanted = as_id(command) if command else None
    here.show(here.ask("reader", lambda connection: commands.receipts(connection, command_id=wanted)), COLUMNS)


@app.command()
def get(context: typer.Context, identity: Annotated[str, typer.Argument(metavar="ID", help="A receipt's id, or a command's.")]) -> None:
    """One receipt; for a command its newest, with a shred's residue as it stands now."""
    here = cli(context)
    wanted = as_id(identity)

    async def read(connection: Connection) -> dict[str, Any] | None:
        found = await commands.receipt(connection, wanted)
        if found is None or found["command_id"] != str(wanted) or found["status"] != "inaccessible":
            return found
        return live(found, await residue.of_command(connection, wanted))

    found = here.ask("reader", read)
    if found is None:
        fail(f"there is no receipt {wanted}, and none of a command with this id", Exit.FAILED)
    here.show(found)
