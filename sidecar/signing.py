"""Signing keys at rest: Ed25519 as PEM files, the private one mode 0600."""

import base64
import os
import stat
from datetime import timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from sidecar import telemetry
from sidecar.core.authority import Authority, Issuer
from sidecar.core.dsse import Signer
from sidecar.core.errors import ConfigurationError
from sidecar.core.model import duration_ms
from sidecar.settings import Settings


def create_signing_key(path: Path) -> Signer:
    """A new key pair: `path`, and `path`.pub beside it. Never over an existing one: raises FileExistsError."""
    key = Ed25519PrivateKey.generate()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    whole = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        os.link(whole, path)  # never half written, never over another
    finally:
        whole.unlink()
    public_path(path).write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return Signer(key)


def public_path(path: Path) -> Path:
    """Where the public half of a private key's file stands."""
    return path.with_name(path.name + ".pub")


def load_signer(path: Path) -> Signer:
    """Raises ConfigurationError: what, where, how to mend."""
    try:
        if stat.S_IMODE(path.stat().st_mode) & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigurationError("others may read the signing key", where=str(path), mend="chmod 0600")
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        what = f"the signing key cannot be read: {getattr(error, 'strerror', None) or 'it is no PEM key'}"
        raise ConfigurationError(what, where=str(path), mend="`sidecar issuer keygen FILE` writes one") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigurationError("the signing key is not Ed25519", where=str(path), mend="`sidecar issuer keygen FILE` writes one")
    return Signer(key)


def control_signer(settings: Settings) -> Signer:
    """The control plane's own key (control.signing_key), for ledger, certificates and checkpoints. Raises ConfigurationError.

    The development profile makes one where there is none; production never does, or a lost volume would go unnoticed.
    """
    path = settings.control.signing_key
    if path is None:
        raise ConfigurationError(
            "the control plane has no signing key", where="control.signing_key", mend="`sidecar issuer keygen FILE` writes one; name it there"
        )
    if settings.profile == "development" and not path.exists():
        try:
            create_signing_key(path)
            telemetry.log.warning("made a signing key, for development only", extra={"action": "start", "file": str(path)})
        except FileExistsError:
            pass  # another process was first
        except OSError as error:
            what = f"the control plane's signing key cannot be written: {error.strerror}"
            raise ConfigurationError(what, where=str(path), mend="name one that is there in control.signing_key") from None
    return load_signer(path)


def authority(settings: Settings) -> Authority:
    """Whose commands this deployment carries out, with the keys read. Raises ConfigurationError."""
    control = settings.control
    found: list[Issuer] = []
    for number, listed in enumerate(control.issuers):
        where = f"control.issuers[{number}]"
        key = load_public_key(listed.public_key_file) if listed.public_key_file else _raw_public_key(listed.public_key or "", where)
        issuer = Issuer(name=listed.name, key=key, ops=frozenset(listed.ops), tenants=tuple(listed.tenants))
        if any(issuer.key_id == other.key_id for other in found):
            raise ConfigurationError(
                "the same public key stands twice: it would be two voices", where=where, mend="give each issuer a key of its own"
            )
        found.append(issuer)
    return Authority(
        audience=settings.deployment,
        issuers=found,
        approvals={str(op): count for op, count in control.approvals.items()},
        max_validity=timedelta(milliseconds=duration_ms(control.max_validity)),
        allow_unsigned=control.allow_unsigned,
    )


def _raw_public_key(text: str, where: str) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(base64.b64decode(text, validate=True))
    except ValueError:
        what = "the public key is no raw Ed25519 key in base64"
        raise ConfigurationError(what, where=where, mend="`sidecar issuer show FILE.pub` prints it, or name the file: public_key_file") from None


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Raises ConfigurationError."""
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        what = f"the public key cannot be read: {getattr(error, 'strerror', None) or 'it is no PEM key'}"
        raise ConfigurationError(what, where=str(path), mend="name the .pub file of a signing key") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigurationError("the public key is not Ed25519", where=str(path), mend="name the .pub file of a signing key")
    return key
