"""`sidecar db`: the schema."""

from typing import Any

import typer

from sidecar.cli.context import cli, run_async
from sidecar.postgres import migrations
from sidecar.postgres.connection import connected

app = typer.Typer(help="The database's schema.", no_args_is_help=True)


@app.command()
def migrate(context: typer.Context) -> None:
    """Apply what is pending; safe to run from many places at once."""
    here = cli(context)

    async def main() -> list[str]:
        async with connected(here.settings.postgres.for_role("migrator")) as connection:
            return await migrations.migrate(connection)

    here.show([{"name": name, "state": "applied"} for name in run_async(main())], ["name", "state"])


@app.command()
def status(context: typer.Context) -> None:
    """Each migration and its state."""
    here = cli(context)

    async def main() -> list[dict[str, Any]]:
        async with connected(here.settings.postgres.for_role("migrator")) as connection:
            return await migrations.status(connection)

    here.show(run_async(main()))
