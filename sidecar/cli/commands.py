"""`sidecar rotate`, `shred`, `hold`, `release`, `readmit` and `reencrypt`: commands to the control plane."""

import sys
from typing import Annotated
from uuid import UUID

import typer

from sidecar.cli.context import Cli, Exit, cli, fail, say
from sidecar.cli.sending import Class, Sending, Stream, Subject, Tenant, scope_of, sends
from sidecar.core.model import Scope
from sidecar.postgres import holds


def add_to(app: typer.Typer) -> None:
    for command in (rotate, shred, hold, release, readmit, reencrypt):
        app.command()(command)


@sends
def rotate(sending: Sending, scope: Scope) -> int:
    """Retire keys: none of them seals anything after the receipt; each gets its next version at its next write."""
    return sending.send("rotate", scope)


@sends
def shred(
    sending: Sending,
    scope: Scope,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    include_plain: Annotated[bool, typer.Option("--include-plain", help="Delete unencrypted events of the scope too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; the receipt says what a shred would do.")] = False,
    grace: Annotated[str | None, typer.Option(metavar="24h", help="Destroy key bytes after that long; unreadable they are at once.")] = None,
) -> int:
    """Make data unreadable, for ever."""
    if not (yes or dry_run):
        _confirm(scope)
    waits = {"grace": grace} if grace else {}
    return sending.send("shred", scope, include_plain=include_plain, dry_run=dry_run, **waits)


@sends
def hold(sending: Sending, scope: Scope) -> int:
    """Place a legal hold: no shred of anything that overlaps it is carried out until it is released."""
    return sending.send("hold", scope)


@sends
def release(
    sending: Sending,
    hold_id: Annotated[UUID | None, typer.Option("--hold", help="Just this hold; else all that were placed on just the scope.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Whose data; found by itself where --hold is given.")] = None,
    stream: Stream = None,
    stream_class: Class = None,
    subject: Subject = None,
) -> int:
    """Release legal holds. Nothing is shredded by that: it only may be, from then on."""
    scope = scope_of(tenant or _holder(cli(sending.context), hold_id), stream, stream_class, subject)
    named = {"hold_id": str(hold_id)} if hold_id else {}
    return sending.send("release", scope, **named)


@sends
def readmit(
    sending: Sending,
    scope: Scope,
    restore: Annotated[bool, typer.Option("--restore", help="Within the shred's grace: take the shred itself back.")] = False,
) -> int:
    """Let a shredded scope take events again, under new keys; what was shredded stays unreadable."""
    wanted = {"restore": True} if restore else {}
    return sending.send("readmit", scope, **wanted)


@sends
def reencrypt(
    sending: Sending,
    tenant: Tenant,
    stream: Stream = None,
    stream_class: Class = None,
    split: Annotated[bool, typer.Option("--split", help="Off a shared key: each stream gets one of its own, and can be shredded alone.")] = False,
    into: Annotated[str | None, typer.Option(metavar="STREAM", help="Of one stream: copy its events into a new one, and leave it as it is.")] = None,
    algorithm: Annotated[str | None, typer.Option(metavar="NAME", help="Only events that are sealed with it: AES-256-GCM, ….")] = None,
    key_version: Annotated[int | None, typer.Option(min=1, help="Only events under that version of their key.")] = None,
) -> int:
    """Seal stored events anew, in place, under the keys and the algorithm that new events get; `sidecar worker` does it."""
    asked = {"split": split or None, "into": into, "algorithm": algorithm, "key_version": key_version}
    wanted = {name: value for name, value in asked.items() if value is not None}
    return sending.send("reencrypt", scope_of(tenant, stream, stream_class, None), **wanted)


def _holder(here: Cli, hold_id: UUID | None) -> str:
    if hold_id is None:
        raise typer.BadParameter("--hold or --tenant")
    found = here.ask("reader", lambda connection: holds.listed(connection, hold_id=hold_id))
    if not found:
        fail(f"there is no hold {hold_id} in force; `sidecar holds list` shows those that are")
    return found[0].tenant_id


def _confirm(scope: Scope) -> None:
    if not sys.stdin.isatty():
        fail(f"nobody is there to confirm the shred of {scope}: give --yes", Exit.USAGE)
    say(f"This makes the data of {scope} unreadable, for ever.")
    if typer.prompt(f"Type the tenant's id ({scope.tenant}) to go on", default="", show_default=False, err=True) != scope.tenant:
        fail("not confirmed; nothing was done", Exit.FAILED)
