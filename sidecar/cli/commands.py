"""`sidecar rotate`, `shred`, `hold`, `release`, `readmit` and `reencrypt`: commands to the control plane."""

import sys
from typing import Annotated
from uuid import UUID

import typer

from sidecar.cli.context import Cli, Exit, cli, fail, run_async, say
from sidecar.cli.sending import Class, Key, Out, Reason, RequestedBy, Stream, Subject, Tenant, Ticket, Wait, scope_of, send
from sidecar.core.model import Scope
from sidecar.postgres import holds
from sidecar.postgres.connection import connected


def add_to(app: typer.Typer) -> None:
    for command in (rotate, shred, hold, release, readmit, reencrypt):
        app.command()(command)


def rotate(
    context: typer.Context,
    tenant: Tenant,
    reason: Reason,
    stream: Stream = None,
    stream_class: Class = None,
    subject: Subject = None,
    wait: Wait = None,
    requested_by: RequestedBy = None,
    ticket: Ticket = None,
    key: Key = None,
    out: Out = None,
) -> int:
    """Retire keys: none of them seals anything after the receipt; each gets its next version at its next write."""
    scope = scope_of(tenant, stream, stream_class, subject)
    return send(cli(context), "rotate", scope, reason=reason, requested_by=requested_by, ticket=ticket, key=key, out=out, wait=wait, options={})


def shred(
    context: typer.Context,
    tenant: Tenant,
    reason: Reason,
    stream: Stream = None,
    stream_class: Class = None,
    subject: Subject = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    wait: Wait = None,
    include_plain: Annotated[bool, typer.Option("--include-plain", help="Delete unencrypted events of the scope too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; the receipt says what a shred would do.")] = False,
    grace: Annotated[str | None, typer.Option(metavar="24h", help="Destroy key bytes after that long; unreadable they are at once.")] = None,
    requested_by: RequestedBy = None,
    ticket: Ticket = None,
    key: Key = None,
    out: Out = None,
) -> int:
    """Make data unreadable, for ever."""
    scope = scope_of(tenant, stream, stream_class, subject)
    if not (yes or dry_run):
        _confirm(scope)
    options = {"include_plain": include_plain, "dry_run": dry_run} | ({"grace": grace} if grace else {})
    return send(cli(context), "shred", scope, reason=reason, requested_by=requested_by, ticket=ticket, key=key, out=out, wait=wait, options=options)


def hold(
    context: typer.Context,
    tenant: Tenant,
    reason: Reason,
    stream: Stream = None,
    stream_class: Class = None,
    subject: Subject = None,
    wait: Wait = None,
    requested_by: RequestedBy = None,
    ticket: Ticket = None,
    key: Key = None,
    out: Out = None,
) -> int:
    """Place a legal hold: no shred of anything that overlaps it is carried out until it is released."""
    scope = scope_of(tenant, stream, stream_class, subject)
    return send(cli(context), "hold", scope, reason=reason, requested_by=requested_by, ticket=ticket, key=key, out=out, wait=wait, options={})


def release(
    context: typer.Context,
    reason: Reason,
    hold_id: Annotated[UUID | None, typer.Option("--hold", help="Just this hold; else all that were placed on just the scope.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Whose data; found by itself where --hold is given.")] = None,
    stream: Stream = None,
    stream_class: Class = None,
    subject: Subject = None,
    wait: Wait = None,
    requested_by: RequestedBy = None,
    ticket: Ticket = None,
    key: Key = None,
    out: Out = None,
) -> int:
    """Release legal holds. Nothing is shredded by that: it only may be, from then on."""
    here = cli(context)
    if tenant is None:
        tenant = _holder(here, hold_id)
    options = {"hold_id": str(hold_id)} if hold_id else {}
    scope = scope_of(tenant, stream, stream_class, subject)
    return send(here, "release", scope, reason=reason, requested_by=requested_by, ticket=ticket, key=key, out=out, wait=wait, options=options)


def readmit(
    context: typer.Context,
    tenant: Tenant,
    reason: Reason,
    stream: Stream = None,
    stream_class: Class = None,
    subject: Subject = None,
    restore: Annotated[bool, typer.Option("--restore", help="Within the shred's grace: take the shred itself back.")] = False,
    wait: Wait = None,
    requested_by: RequestedBy = None,
    ticket: Ticket = None,
    key: Key = None,
    out: Out = None,
) -> int:
    """Let a shredded scope take events again, under new keys; what was shredded stays unreadable."""
    scope = scope_of(tenant, stream, stream_class, subject)
    options = {"restore": True} if restore else {}
    return send(cli(context), "readmit", scope, reason=reason, requested_by=requested_by, ticket=ticket, key=key, out=out, wait=wait, options=options)


def reencrypt(
    context: typer.Context,
    tenant: Tenant,
    reason: Reason,
    stream: Stream = None,
    stream_class: Class = None,
    split: Annotated[bool, typer.Option("--split", help="Off a shared key: each stream gets one of its own, and can be shredded alone.")] = False,
    wait: Wait = None,
    requested_by: RequestedBy = None,
    ticket: Ticket = None,
    key: Key = None,
    out: Out = None,
) -> int:
    """Seal stored events anew, in place, under the keys and the algorithm that new events get; `sidecar worker` does it."""
    scope = scope_of(tenant, stream, stream_class, None)
    options = {"split": True} if split else {}
    return send(
        cli(context), "reencrypt", scope, reason=reason, requested_by=requested_by, ticket=ticket, key=key, out=out, wait=wait, options=options
    )


def _holder(here: Cli, hold_id: UUID | None) -> str:
    if hold_id is None:
        raise typer.BadParameter("--hold or --tenant")

    async def main() -> list[holds.Hold]:
        async with connected(here.settings.postgres.for_role("reader"), application_name="sidecar cli") as connection:
            return await holds.listed(connection, hold_id=hold_id)

    found = run_async(main())
    if not found:
        fail(f"there is no hold {hold_id} in force; `sidecar holds list` shows those that are")
    return found[0].tenant_id


def _confirm(scope: Scope) -> None:
    if not sys.stdin.isatty():
        fail(f"nobody is there to confirm the shred of {scope}: give --yes", Exit.USAGE)
    say(f"This makes the data of {scope} unreadable, for ever.")
    if typer.prompt(f"Type the tenant's id ({scope.tenant}) to go on", default="", show_default=False, err=True) != scope.tenant:
        fail("not confirmed; nothing was done", Exit.FAILED)
