"""`sidecar config`: is it right, and what is in force."""

import typer

from sidecar.cli.context import cli
from sidecar.postgres.connection import without_password

app = typer.Typer(help="The configuration.", no_args_is_help=True)


@app.command()
def check(context: typer.Context) -> None:
    """Load the configuration; exit 2 with what, where and how to mend if it cannot be used. Connects to nothing."""
    here = cli(context)
    settings = here.settings
    here.show({"ok": True, "deployment": settings.deployment, "profile": settings.profile})


@app.command()
def show(context: typer.Context) -> None:
    """Every setting and its value; secrets are not shown."""
    here = cli(context)
    document = here.settings.model_dump(mode="json", by_alias=True)
    for name in ("dsn", "dsn_data", "dsn_control", "dsn_worker", "dsn_reader", "dsn_migrator"):
        secret = getattr(here.settings.postgres, name)
        document["postgres"][name] = without_password(secret.get_secret_value()) if secret else None
    here.show(document)
