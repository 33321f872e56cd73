"""`sidecar command`: a command in a file, which `--out` wrote, on its way through the hands of those who must sign it."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from sidecar.cli.context import Exit, cli, fail, say
from sidecar.cli.sending import Key, Wait, publish, read_file, signer_of
from sidecar.core import dsse
from sidecar.core.command import PAYLOAD_TYPE, parse
from sidecar.core.errors import CommandRejected
from sidecar.signing import authority

app = typer.Typer(help="Commands in files, for several to sign: SHRED … --out FILE, then these.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(help="What `sidecar shred … --out FILE` wrote.")]


@app.command()
def show(context: typer.Context, file: File) -> None:
    """What a file commands, who signed it, and whether this deployment would accept it as it is."""
    here = cli(context)
    _, signed, payload = read_file(file)
    rules = authority(here.settings)
    outcome = parse(file.read_bytes(), rules, now=datetime.now(UTC)).outcome
    names = {issuer.key_id: issuer.name for issuer in rules.issuers}
    said: dict[str, Any] = json.loads(payload)
    said["signatures"] = [{"key_id": key_id, "issuer": names.get(key_id)} for key_id, _ in signed.signatures] if signed else []
    said["verdict"] = {"code": outcome.code, "message": str(outcome)} if isinstance(outcome, CommandRejected) else None
    here.show(said)


@app.command()
def sign(context: typer.Context, file: File, key: Key = None) -> None:
    """Add a signature. Read `sidecar command show FILE` first: you vouch for all that stands in it."""
    here = cli(context)
    command, signed, payload = read_file(file)
    signer = signer_of(here, key)
    if signer is None:
        fail("no key to sign with: give --key", Exit.USAGE)
    others = tuple(pair for pair in signed.signatures if pair[0] != signer.key_id) if signed else ()
    added = dsse.Signed(payload_type=PAYLOAD_TYPE, payload=payload, signatures=(*others, signer.sign(PAYLOAD_TYPE, payload)))
    file.write_bytes(added.to_bytes())
    say(f"signed: {command.op} {command.scope}, asked for by {command.requested_by}: {command.reason}")
    here.show({"command_id": str(command.command_id), "file": str(file), "signatures": [key_id for key_id, _ in added.signatures]})


@app.command()
def send(context: typer.Context, file: File, wait: Wait = None) -> int:
    """Send it. Once more does no harm: a command is carried out once."""
    command, _, _ = read_file(file)
    return publish(cli(context), command, file.read_bytes(), wait)
