"""`sidecar db`: the schema, and who may do what in it."""

from typing import Annotated

import typer

from sidecar.cli.context import cli, say
from sidecar.postgres import migrations
from sidecar.postgres import roles as database_roles

app = typer.Typer(help="The database's schema.", no_args_is_help=True)


@app.command()
def migrate(context: typer.Context) -> None:
    """Apply what is pending; safe to run from many places at once."""
    here = cli(context)
    here.show([{"name": name, "state": "applied"} for name in here.ask("migrator", migrations.migrate)], ["name", "state"])


@app.command()
def status(context: typer.Context) -> None:
    """Each migration and its state."""
    here = cli(context)
    here.show(here.ask("migrator", migrations.status))


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
    if print_:
        made = here.ask("migrator", lambda connection: database_roles.statements(connection, prefix))
        typer.echo("".join(f"{statement};\n" for statement in made), nl=False)
        return
    here.show(here.ask("migrator", lambda connection: database_roles.apply(connection, prefix)))
    say(
        f"next:  CREATE ROLE … LOGIN PASSWORD … IN ROLE {prefix}_data, and so on; for a reader ?search_path={prefix}_reader,public&sidecar.tenant=… in the dsn"
    )
