"""`sidecar jobs`: how far re-encryptions are."""

import time
from typing import Annotated
from uuid import UUID

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sidecar.cli.context import Exit, cli, fail, say, show_line
from sidecar.postgres import jobs

app = typer.Typer(help="Long jobs, which `sidecar worker` works off.", no_args_is_help=True)
_COLUMNS = ("command_id", "tenant", "state", "done", "chunks", "resealed", "left_alone", "workers")


@app.command("list")
def list_(context: typer.Context) -> None:
    """Every re-encryption with its progress, newest last."""
    here = cli(context)
    here.show(here.ask("reader", jobs.progress), _COLUMNS)


@app.command()
def watch(
    context: typer.Context,
    command_id: UUID,
    seconds: Annotated[float | None, typer.Option("--wait", min=0, metavar="SECONDS", help="Exit 4 if it is not done by then.")] = None,
) -> int:
    """Until it is done: a progress bar, or with -o json a line per look."""
    here = cli(context)
    until = None if seconds is None else time.monotonic() + seconds
    bar = Progress(
        TextColumn("{task.fields[resealed]} events"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), disable=here.as_json,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=None, resealed=0)
        while True:
            found = here.ask("reader", lambda connection: jobs.progress(connection, command_id))
            if not found:
                fail(f"there is no re-encryption {command_id}, or it found nothing to do; `sidecar receipts get {command_id}` says which")
            [row] = found
            bar.update(task, total=row["chunks"], completed=row["done"], resealed=row["resealed"])
            if here.as_json:
                show_line(row)
            if row["state"] == "done":
                return Exit.DONE
            if until is not None and time.monotonic() > until:
                say("it is not done yet; is a `sidecar worker` running?")
                return Exit.PENDING
            time.sleep(0.5)
