"""`sidecar db`: the schema, and who may do what in it."""

from typing import Annotated, Any

import typer

from sidecar.cli.context import cli, run_async, say
from sidecar.postgres import migrations
from sidecar.postgres import roles as database_roles
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


@app.command()
def roles(
    context: typer.Context,
    prefix: Annotated[
        str, typer.Option(help="The roles are PREFIX_data, PREFIX_control, PREFIX_worker, PREFIX_reader, PREFIX_migrator.")
    ] = "sidecar",
    print_: Annotated[bool, typer.Option("--print", help="Change nothing; print the SQL.")] = False,
) -> None:
    """Make group roles for both planes, workers, readers and migrations, or make them right again. Run it after each migration."""
    here = cli(context)

    async def main() -> list[Any]:
        async with connected(here.settings.postgres.for_role("migrator")) as connection:
            return await (database_roles.statements if print_ else database_roles.apply)(connection, prefix)

    made = run_async(main())
    if print_:
        typer.echo("".join(f"{statement};\n" for statement in made), nl=False)
        return
    here.show(made)
    say(
        f"next:  CREATE ROLE … LOGIN PASSWORD … IN ROLE {prefix}_data, and so on; for a reader ?search_path={prefix}_reader,public&sidecar.tenant=… in the dsn"
    )
