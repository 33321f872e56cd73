"""`sidecar issuer`: key pairs that commands are signed with."""

import base64
from pathlib import Path
from typing import Annotated, Any

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from sidecar.cli.context import Exit, cli, fail, say
from sidecar.core.dsse import key_id
from sidecar.signing import create_signing_key, load_public_key, public_path

app = typer.Typer(help="Keys that commands are signed with.", no_args_is_help=True)

Name = Annotated[str | None, typer.Option(help="What the issuer is called; the file's name by default.")]


@app.command()
def keygen(
    context: typer.Context, file: Annotated[Path, typer.Argument(help="Where the private key goes; FILE.pub beside it.")], name: Name = None
) -> None:
    """A new key pair, and what to write into control.issuers. The private key never leaves whoever signs with it."""
    try:
        signer = create_signing_key(file)
    except FileExistsError:
        fail(f"error: {file} is there already; nothing was changed\n  mend:  name another file, or remove it", Exit.USAGE)
    except OSError as error:
        fail(f"error: the key cannot be written\n  where: {file}: {error.strerror}\n  mend:  name a file in a folder of yours", Exit.USAGE)
    cli(context).show({"private_key_file": str(file)} | _described(signer.public, public_path(file), name or file.name))


@app.command()
def show(context: typer.Context, file: Annotated[Path, typer.Argument(help="A .pub file.")], name: Name = None) -> None:
    """A public key's id, and what to write into control.issuers."""
    cli(context).show(_described(load_public_key(file), file, name or file.stem))


def _described(public: Ed25519PublicKey, file: Path, name: str) -> dict[str, Any]:
    raw = base64.b64encode(public.public_bytes_raw()).decode()
    say(
        f"""control:
  issuers:
    - name: {name}
      public_key: {raw}
      ops: ["*"]        # or some of shred, rotate, hold, release, readmit, reencrypt
      tenants: ["*"]    # globs"""
    )
    return {"key_id": key_id(public), "public_key": raw, "public_key_file": str(file)}
