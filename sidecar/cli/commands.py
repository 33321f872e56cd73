"""`sidecar rotate` and `sidecar shred`: publish a command and, if asked to, wait for its receipt."""

import asyncio
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from uuid import UUID, uuid4

import typer

from sidecar.cli.context import Cli, Exit, cli, fail, run_async, say, who
from sidecar.core.command import compose
from sidecar.core.errors import MalformedRecord
from sidecar.core.model import Scope, ScopeKind, identifier, tenant_id
from sidecar.kafka.receipts import publish_command
from sidecar.postgres import commands
from sidecar.postgres.connection import connected

VALID_FOR = timedelta(days=1)
_FINAL = {"rotate": ("done", "rejected", "failed"), "shred": ("inaccessible", "complete", "done", "rejected", "failed")}
_NOT_ALLOWED = ("unsigned", "bad_signature", "unknown_issuer", "not_permitted", "approvals_missing", "legal_hold")

Tenant = Annotated[str, typer.Option(help="Whose data.")]
Stream = Annotated[str | None, typer.Option(help="Only this stream of the tenant.")]
Class = Annotated[str | None, typer.Option("--class", help="Only the streams of this class.")]
Subject = Annotated[str | None, typer.Option(help="Only the events of this person.")]
Reason = Annotated[str, typer.Option(help="Why; goes with the command. Name no data subject in it.")]
Wait = Annotated[float | None, typer.Option(min=0, metavar="SECONDS", help="Wait for the receipt; exit 4 if it does not come in time.")]
RequestedBy = Annotated[str | None, typer.Option(help="Who asks; user@host by default.")]
Ticket = Annotated[str | None, typer.Option(help="Your reference.")]


def add_to(app: typer.Typer) -> None:
    @app.command()
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
    ) -> int:
        """Retire keys: none of them seals anything after the receipt; each gets its next version at its next write."""
        scope = _scope(tenant, stream, stream_class, subject)
        return _send(cli(context), "rotate", scope, reason=reason, requested_by=requested_by, ticket=ticket, wait=wait, options={})

    @app.command()
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
        requested_by: RequestedBy = None,
        ticket: Ticket = None,
    ) -> int:
        """Make data unreadable, for ever."""
        scope = _scope(tenant, stream, stream_class, subject)
        if not yes:
            _confirm(scope)
        options = {"include_plain": include_plain, "dry_run": False}
        return _send(cli(context), "shred", scope, reason=reason, requested_by=requested_by, ticket=ticket, wait=wait, options=options)


def _scope(tenant: str, stream: str | None, stream_class: str | None, subject: str | None) -> Scope:
    named = {ScopeKind.STREAM: stream, ScopeKind.CLASS: stream_class, ScopeKind.SUBJECT: subject}
    given = [(kind, text) for kind, text in named.items() if text is not None]
    if len(given) > 1:
        raise typer.BadParameter("one of --stream, --class and --subject")
    try:
        whose = tenant_id(tenant)
        for kind, text in given:
            return Scope(tenant=whose, kind=kind, id=identifier(text.encode("utf-8", "replace"), kind.value))
    except MalformedRecord as error:
        raise typer.BadParameter(str(error)) from None
    return Scope.of_tenant(whose)


def _confirm(scope: Scope) -> None:
    if not sys.stdin.isatty():
        fail(f"nobody is there to confirm the shred of {scope}: give --yes", Exit.USAGE)
    say(f"This makes the data of {scope} unreadable, for ever.")
    if typer.prompt(f"Type the tenant's id ({scope.tenant}) to go on", default="", show_default=False, err=True) != scope.tenant:
        fail("not confirmed; nothing was done", Exit.FAILED)


def _send(
    where: Cli, op: str, scope: Scope, *, reason: str, requested_by: str | None, ticket: str | None, wait: float | None, options: dict[str, Any]
) -> int:
    if not reason.strip():
        raise typer.BadParameter("a reason is needed", param_hint="--reason")
    now = datetime.now(UTC)
    command_id = uuid4()
    value = compose(
        command_id=command_id, audience=where.settings.deployment, op=op, scope=scope, reason=reason, requested_by=requested_by or who(),
        ticket=ticket, issued_at=now, not_after=now + VALID_FOR, options=options,
    )  # fmt: skip
    publish_command(where.settings, scope.tenant, value)
    if wait is None:
        where.show({"command_id": str(command_id)})
        return Exit.DONE
    found = run_async(_receipt(where.settings.postgres.for_role("reader"), command_id, _FINAL[op], wait))
    where.show(found or {"command_id": str(command_id)})
    if found is None or found["status"] not in _FINAL[op]:
        say(f"no final receipt within {wait:g} s; `sidecar receipts get {command_id}` shows it when it comes")
        return Exit.PENDING
    if found["status"] in ("rejected", "failed"):
        error = found["error"] or {}
        say(f"{found['status']}: {error.get('message')} ({error.get('code')})")
        return Exit.DENIED if error.get("code") in _NOT_ALLOWED else Exit.FAILED
    return Exit.DONE


async def _receipt(dsn: str, command_id: UUID, final: tuple[str, ...], wait: float) -> dict[str, Any] | None:
    """The newest receipt, final or what there is when the time is up."""
    deadline = time.monotonic() + wait
    async with connected(dsn, application_name="sidecar cli") as connection:
        while True:
            found = await commands.receipt(connection, command_id)
            if (found is not None and found["status"] in final) or time.monotonic() > deadline:
                return found
            await asyncio.sleep(0.02)
