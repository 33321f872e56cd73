"""`sidecar import`: events of another table, through policy, keys and seal."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sidecar.cli.context import Cli, Exit, cli, run_async, say, show_line, who
from sidecar.import_map import ImportMap, load_map
from sidecar.importing import Import, Verified

_COLUMNS = ("class", "streams", "events", "outcome", "algorithm", "key_scope")


def add_to(app: typer.Typer) -> None:
    app.command("import")(import_)


def import_(
    context: typer.Context,
    map_: Annotated[Path, typer.Option("--map", help="YAML: which table, and what its columns are to us. docs/migration.md.", metavar="FILE")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing; say what each class would become.")] = False,
    sample: Annotated[int, typer.Option(min=0, max=100_000, help="So many events are read back and compared at the end.")] = 100,
) -> int:
    """Take over the events of another table. May be killed and run again; the table is only read. Exit 1 if the check at the end finds a fault."""
    here = cli(context)
    return run_async(_import(here, load_map(map_), dry_run, sample))


async def _import(here: Cli, plan: ImportMap, dry_run: bool, sample: int) -> int:
    from sidecar.library import open_library
    from sidecar.postgres.imports import open_source
    from sidecar.steps import SystemClock

    ours = here.settings.postgres.for_role("data")
    async with (
        open_library(here.settings, max_connections=4, writer=f"import-{plan.name}") as library,
        open_source(plan.dsn(ours), plan.table()) as source,
    ):
        work = Import(plan, source, library.store, library.keys, library.classify, library.plain.pool, SystemClock(), who())
        if dry_run:
            here.show(await work.preview(), _COLUMNS)
            return Exit.DONE
        await _progress(here, work)
        found = await work.verify(sample)
    return _say(here, found)


async def _progress(here: Cli, work: Import) -> None:
    bar = Progress(
        TextColumn("{task.fields[refused]} refused"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=Console(stderr=True),
        disable=here.as_json,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=None, refused=0)
        async for at in work.run():
            bar.update(task, total=at.of, completed=at.imported + at.refused, refused=at.refused)
            if here.as_json:
                show_line({"state": "importing", "imported": at.imported, "refused": at.refused, "of": at.of})


def _say(here: Cli, found: Verified) -> int:
    document: dict[str, Any] = found.document
    if here.as_json:
        show_line(document)
    else:
        here.show(document)
        for fault in found.faults:
            say(f"error: {fault}")
    return Exit.FAILED if found.faults else Exit.DONE
