"""How a command leaves the command line: composed, signed, published or written to a file, and its receipt waited for."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec
from uuid import uuid4

import typer

from sidecar.cli.context import Cli, Exit, cli, run_async, say, who
from sidecar.core import dsse
from sidecar.core.command import NOT_ALLOWED, PAYLOAD_TYPE, Command, check, compose, final_statuses, opened
from sidecar.core.dsse import Signer
from sidecar.core.errors import CommandRejected, MalformedRecord
from sidecar.core.model import Scope, ScopeKind, duration_ms, identifier, tenant_id
from sidecar.kafka.receipts import publish_command
from sidecar.sending import VALID_FOR, publish_and_wait
from sidecar.signing import load_signer

P = ParamSpec("P")
KEY_VARIABLE = "SIDECAR_ISSUER_KEY"

Tenant = Annotated[str, typer.Option(help="Whose data.")]
Stream = Annotated[str | None, typer.Option(help="Only this stream of the tenant.")]
Class = Annotated[str | None, typer.Option("--class", help="Only the streams of this class.")]
Subject = Annotated[str | None, typer.Option(help="Only the events of this person.")]
Reason = Annotated[str, typer.Option(help="Why; goes with the command. Name no data subject in it.")]
Wait = Annotated[float | None, typer.Option(min=0, metavar="SECONDS", help="Wait for the receipt; exit 4 if it does not come in time.")]
RequestedBy = Annotated[str | None, typer.Option(help="Who asks; user@host by default.")]
Ticket = Annotated[str | None, typer.Option(help="Your reference.")]
Key = Annotated[Path | None, typer.Option(help=f"The private key to sign with; else ${KEY_VARIABLE}, else control.issuer_key.")]
Out = Annotated[Path | None, typer.Option(metavar="FILE", help="Send nothing: write the command there, for others to sign (`sidecar command`).")]


def scope_of(tenant: Tenant, stream: Stream = None, stream_class: Class = None, subject: Subject = None) -> Scope:
    """What the options name; without any but `tenant` the tenant itself. Raises typer.BadParameter."""
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


def signer_of(where: Cli, key: Path | None) -> Signer | None:
    """None if no key is named anywhere. Raises ConfigurationError."""
    named = key or os.environ.get(KEY_VARIABLE) or where.settings.control.issuer_key
    return load_signer(Path(named)) if named else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """What each command to the control plane takes beside its own options; `sends` adds it to them."""

    context: typer.Context
    reason: Reason
    wait: Wait = None
    requested_by: RequestedBy = None
    ticket: Ticket = None
    key: Key = None
    out: Out = None

    def send(self, op: str, scope: Scope, **options: Any) -> int:
        """A new command, on its way or in a file; -> the exit code. One for a file may take its time: it is valid as long as the deployment allows."""
        where, now, command_id = cli(self.context), datetime.now(UTC), uuid4()
        control = where.settings.control
        valid_for = VALID_FOR if self.out is None else timedelta(milliseconds=duration_ms(control.max_validity))
        payload = compose(
            command_id=command_id, audience=where.settings.deployment, op=op, scope=scope, reason=self.reason,
            requested_by=self.requested_by or who(), ticket=self.ticket, issued_at=now, not_after=now + valid_for, options=options,
        )  # fmt: skip
        try:
            command = check(payload)
        except CommandRejected as error:
            raise typer.BadParameter(str(error)) from None
        signer = signer_of(where, self.key)
        value = dsse.sign(PAYLOAD_TYPE, payload, [signer]).to_bytes() if signer else payload
        if self.out is None:
            return publish(where, command, value, self.wait)
        self.out.write_bytes(value)
        where.show({"command_id": str(command_id), "file": str(self.out), "signatures": [signer.key_id] if signer else []})
        return Exit.DONE


def sends(command: Callable[Concatenate[Sending, P], int]) -> Callable[..., int]:
    """As typer sees it, `command` has the options of `Sending` behind its own, in place of its first parameter, and those that name a scope in
    place of one that is called `scope`."""
    shared, naming, (_, *own) = signature(Sending).parameters, signature(scope_of).parameters, signature(command).parameters.values()
    of_scope = any(parameter.name == "scope" for parameter in own)

    @wraps(command)
    def whole(**given: Any) -> int:
        sending = Sending(**{name: given.pop(name) for name in shared})
        if of_scope:
            given["scope"] = scope_of(**{name: given.pop(name) for name in naming})
        return command(sending, **given)  # type: ignore[call-arg]

    both = [*(naming.values() if of_scope else ()), *(parameter for parameter in own if parameter.name != "scope"), *shared.values()]
    whole.__signature__ = Signature(both)  # type: ignore[attr-defined]
    whole.__annotations__ = {parameter.name: parameter.annotation for parameter in both}
    return whole


def read_file(file: Path) -> tuple[Command, dsse.Signed | None, bytes]:
    """-> the command in a file that `--out` wrote, its envelope (None: not signed yet), its payload."""
    try:
        signed, payload = opened(file.read_bytes())
        return check(payload), signed, payload
    except OSError as error:
        raise typer.BadParameter(f"{file}: {error.strerror}") from None
    except CommandRejected as error:
        raise typer.BadParameter(f"{file} holds no command: {error}") from None


def publish(where: Cli, command: Command, value: bytes, wait: float | None) -> int:
    """-> the exit code."""
    if wait is None:
        publish_command(where.settings, command.scope.tenant, value)
        where.show({"command_id": str(command.command_id)})
        return Exit.DONE
    final = final_statuses(command.op)
    found = run_async(publish_and_wait(where.settings, command.scope.tenant, command.command_id, value, final, wait))
    where.show(found or {"command_id": str(command.command_id)})
    if found is None or found["status"] not in final:
        say(f"no final receipt within {wait:g} s; `sidecar receipts get {command.command_id}` shows it when it comes")
        return Exit.PENDING
    if found["status"] in ("rejected", "failed"):
        error = found["error"] or {}
        say(f"{found['status']}: {error.get('message')} ({error.get('code')})")
        return Exit.DENIED if error.get("code") in NOT_ALLOWED else Exit.FAILED
    return Exit.DONE
