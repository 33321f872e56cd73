"""`sidecar holds`: the legal holds there are."""

from dataclasses import asdict
from typing import Annotated

import typer

from sidecar.cli.context import cli
from sidecar.postgres import holds

app = typer.Typer(help="Legal holds; `sidecar hold` and `sidecar release` place and end them.", no_args_is_help=True)


@app.command("list")
def list_(
    context: typer.Context,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    released: Annotated[bool, typer.Option("--released", help="Those too that are not in force any more.")] = False,
) -> None:
    """Holds in force, oldest first."""
    here = cli(context)
    found = here.ask("reader", lambda connection: holds.listed(connection, tenant=tenant, released=released))
    here.show([asdict(hold) for hold in found])
