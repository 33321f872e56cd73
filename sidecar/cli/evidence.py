"""`sidecar evidence`: certificates of shreds. `verify` needs a file and a public key, and nothing else."""

import re
from pathlib import Path
from time import monotonic, sleep
from typing import Annotated

import typer

from sidecar.cli.context import Exit, cli, fail, say
from sidecar.cli.receipts import as_id
from sidecar.core import certificate
from sidecar.core.command import stored
from sidecar.core.dsse import key_id
from sidecar.core.errors import AuthenticationFailed, MalformedEnvelope
from sidecar.core.model import Scope, ScopeKind
from sidecar.postgres import evidence
from sidecar.signing import load_public_key

app = typer.Typer(help="Certificates of shreds.", no_args_is_help=True)

_COLUMNS = ("certificate_id", "command_id", "tenant_id", "status", "created_at", "taken_back")
_SCOPE = re.compile(r"tenant=([^,]+)(?:,kind=([a-z]+)(?:,id=(.+))?)?", re.DOTALL)


@app.command("list")
def list_(
    context: typer.Context,
    tenant: Annotated[str | None, typer.Option(help="Only those of this tenant.")] = None,
    command: Annotated[str | None, typer.Option(help="Only those of this command.")] = None,
) -> None:
    """Every certificate, newest last."""
    here = cli(context)
    wanted = as_id(command) if command else None
    here.show(here.ask("reader", lambda connection: evidence.listed(connection, tenant=tenant, command_id=wanted)), _COLUMNS)


@app.command()
def get(
    context: typer.Context,
    identity: Annotated[str, typer.Argument(metavar="ID", help="A certificate's id; a command's gives its newest.")],
    output: Annotated[Path | None, typer.Option("--output", help="Write it to this file, to the byte as it was signed.", metavar="FILE")] = None,
    with_salt: Annotated[
        bool, typer.Option("--with-salt", help="Also say salt and scope, for the one who asked for the shred. Needs --output.")
    ] = False,
    wait: Annotated[
        float,
        typer.Option(min=0, help="Wait for it: a shred has its first one seconds after its receipt. Exit 4 if it does not come.", metavar="SECONDS"),
    ] = 0,
) -> None:
    """One certificate: on stdout, or to a file. Who has the salt can show of whom it is; it is never in the certificate."""
    here = cli(context)
    if with_salt and output is None:
        raise typer.BadParameter("the salt does not belong beside the certificate: name a file with --output", param_hint="--with-salt")
    wanted = as_id(identity)
    # the salt is for who may command a shred: a reader's role need not see it
    deadline = monotonic() + wait
    while (found := here.ask("control" if with_salt else "reader", lambda connection: evidence.find(connection, wanted))) is None:
        if monotonic() >= deadline:
            fail(
                f"there is no certificate {wanted}, and none of a command with this id{' yet' if wait else ''}", Exit.PENDING if wait else Exit.FAILED
            )
        sleep(0.5)
    if output is None:
        typer.get_binary_stream("stdout").write(found["envelope"])
        return
    try:
        output.write_bytes(found["envelope"])
    except OSError as error:
        fail(f"error: {output} cannot be written: {error.strerror}", Exit.USAGE)
    said = {name: found[name] for name in ("certificate_id", "command_id", "status")} | {"file": str(output)}
    if with_salt:
        said |= {"scope": _written(stored(found["payload"]).scope), "salt": found["salt"].hex()}
    here.show(said)


def _written(scope: Scope) -> str:
    """As `verify --scope` takes it."""
    return f"tenant={scope.tenant},kind={scope.kind.value}" + ("" if scope.kind is ScopeKind.TENANT else f",id={scope.id}")


def _scope(text: str) -> Scope:
    match = _SCOPE.fullmatch(text)
    kind = (match[2] or "tenant") if match else ""
    if not match or kind not in list(ScopeKind) or (kind == "tenant") != (match[3] is None or match[3] == match[1]):
        raise typer.BadParameter("tenant=T or tenant=T,kind=stream|class|subject,id=ID", param_hint="--scope")
    return Scope(tenant=match[1], kind=ScopeKind(kind), id=match[3] or match[1])


@app.command()
def verify(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A certificate, as `evidence get --output` wrote it.")],
    key: Annotated[list[Path], typer.Option(help="The issuer's public key, FILE.pub. Can stand several times: one must fit.")],
    scope: Annotated[str | None, typer.Option(help="Check that it is about this: tenant=T[,kind=K,id=ID].")] = None,
    salt: Annotated[str | None, typer.Option(help="The salt that was handed out with it, in hex.", metavar="HEX")] = None,
) -> None:
    """Check a certificate, offline: needs no configuration, database or broker. Exit 1 if it does not verify."""
    here = cli(context)
    if (scope is None) != (salt is None):
        raise typer.BadParameter("--scope and --salt go together")
    keys = {key_id(k): k for k in map(load_public_key, key)}
    try:
        raw = file.read_bytes()
        secret = bytes.fromhex(salt or "")
    except OSError as error:
        fail(f"error: {file} cannot be read: {error.strerror}", Exit.USAGE)
    except ValueError:
        raise typer.BadParameter("not hex", param_hint="--salt") from None
    try:
        document = certificate.verify(raw, keys)
        words = certificate.in_words(document)
        if scope is not None:
            certificate.check_scope(document, _scope(scope), secret)
            words.insert(1, f"it is about {_scope(scope)}: the salt fits")
    except (MalformedEnvelope, AuthenticationFailed) as error:
        if here.as_json:
            here.show({"verified": False, "scope_verified": False, "key_id": None, "problem": str(error), "certificate": None})
        fail(f"does not verify: {error}", Exit.FAILED)
    signed_by = document["issuer"]["key_id"]
    if here.as_json:
        here.show({"verified": True, "scope_verified": scope is not None, "key_id": signed_by, "problem": None, "certificate": document})
        return
    say(f"verified: signed with the key {signed_by}, and nothing in it was changed since")
    if scope is None:
        say("not verified: of whom it is (--scope and --salt)")
    for line in words:
        typer.echo(line)
    say(document["statement"])
