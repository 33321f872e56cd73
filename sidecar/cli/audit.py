"""`sidecar audit`: the trail of key operations and commands."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from sidecar import checkpoints
from sidecar.cli.context import Exit, cli, fail, say
from sidecar.core.audit import AuditRow
from sidecar.core.dsse import key_id
from sidecar.postgres import audit
from sidecar.settings import Settings
from sidecar.signing import load_public_key, public_path

app = typer.Typer(help="The trail of key operations and commands.", no_args_is_help=True)

COLUMNS = ("writer", "seq", "at", "action", "actor", "details")


def _shown(row: AuditRow) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in fields(row)}


@app.command()
def tail(context: typer.Context, limit: Annotated[int, typer.Option(min=1, help="How many.")] = 20) -> None:
    """The newest rows, newest last; bytes in hex."""
    here = cli(context)
    here.show([_shown(row) for row in here.ask("reader", lambda connection: audit.read(connection, limit=limit))], COLUMNS)


def _own_key(settings: Settings) -> list[Path]:
    """The public half of the control plane's signing key, where this machine has it."""
    path = settings.control.signing_key
    return [public_path(path)] if path is not None and public_path(path).exists() else []


@app.command()
def verify(
    context: typer.Context,
    key: Annotated[
        list[Path] | None, typer.Option(help="The control plane's public key, FILE.pub; also an older one. Can stand several times.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Only the database's checkpoints, not those on the topic.")] = False,
) -> None:
    """Recompute each writer's chain and hold it against the signed checkpoints.

    Exit 1 if a row was changed, removed, put in or moved, or a checkpoint is forged or missing. `uncovered_since`: rows from then on have no
    checkpoint yet, and a removal of the newest of them would not show.
    """
    here = cli(context)
    keys = [load_public_key(path) for path in key or _own_key(here.settings)]
    if not keys:
        say("checkpoints are not checked: name the control plane's public key with --key")
    trusted = {key_id(k): k for k in keys}
    found = here.ask("reader", lambda connection: checkpoints.verify(here.settings, connection, trusted, offline=offline))
    here.show(found, ("writer", "seq", "ok", "problem", "covered_seq", "covered_at", "uncovered_since"))
    if not all(entry["ok"] for entry in found):
        fail("the audit trail is broken", Exit.FAILED)
