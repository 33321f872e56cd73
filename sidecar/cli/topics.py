"""`sidecar topics`: what the product needs of Kafka."""

import typer

from sidecar import topics
from sidecar.cli.context import cli
from sidecar.kafka.admin import Admin

app = typer.Typer(help="The topics that the sidecar needs.", no_args_is_help=True)
_COLUMNS = ("topic", "action", "partitions", "config", "differs")


@app.command()
def plan(context: typer.Context) -> None:
    """What would be created, and what stands otherwise than it should."""
    here = cli(context)
    here.show(topics.plan(here.settings, Admin(here.settings)), _COLUMNS)


@app.command()
def apply(context: typer.Context) -> None:
    """Create what is missing. What stands otherwise is shown, never changed."""
    here = cli(context)
    here.show(topics.apply(here.settings, Admin(here.settings)), _COLUMNS)
