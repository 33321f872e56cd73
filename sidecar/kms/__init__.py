"""KMS providers by URI, behind `ports.Kms`. A provider's client library is imported when its URI is used, from an extra of the same name."""

from importlib import import_module
from typing import Final, Literal

from sidecar import telemetry
from sidecar.core.errors import ConfigurationError
from sidecar.core.kms import KmsUri
from sidecar.kms.wrappers import Watched
from sidecar.ports import Kms
from sidecar.servers import KmsSettings

PROVIDERS: Final[dict[str, tuple[str, str, str | None]]] = {
    "file": ("sidecar.kms.file", "FileKms", None),
    "pkcs11": ("sidecar.kms.pkcs11", "Pkcs11Kms", "pkcs11"),
    "vault": ("sidecar.kms.vault", "VaultKms", "vault"),
    "aws-kms": ("sidecar.kms.aws", "AwsKms", "aws"),
}
"""Scheme → module, class taking a KmsUri, extra. Another provider is a module and a line here."""


def open_kms(uri: str) -> Watched:
    """The provider of a URI, not reached yet. Raises ConfigurationError for one that this release or this installation does not have."""
    return Watched(provider(uri))


def open_for(kms: KmsSettings, role: Literal["data", "control", "reader"]) -> Watched:
    """With a role's own identity. Raises ConfigurationError when that is another key than the data plane's."""
    own, data = open_kms(kms.for_role(role)), open_kms(kms.for_role("data"))
    if own.uri != data.uri:
        what = f"{role} would use {own.uri}, the data plane {data.uri}"
        raise ConfigurationError(what, where=f"kms.uri_{role}", mend="the same key, through another identity")
    return own


def provider(uri: str) -> Kms:
    """Bare, without metrics and patience."""
    parsed = KmsUri.parse(uri)
    if parsed.scheme not in PROVIDERS:
        known = ", ".join(f"{scheme}:" for scheme in PROVIDERS)
        raise ConfigurationError(f"no KMS provider for {parsed.scheme!r}", where="kms.uri", mend=f"this release has {known}")
    module, name, extra = PROVIDERS[parsed.scheme]
    try:
        kind = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if extra is None or (error.name or "").startswith("sidecar"):
            raise
        mend = f"pip install 'sidecar[{extra}]'"
        raise ConfigurationError(f"{parsed.scheme}: needs the Python package {error.name}", where="kms.uri", mend=mend) from None
    opened: Kms = kind(parsed)
    return opened


async def check_identity(kms: Kms, role: Literal["data", "control"], *, production: bool) -> None:
    """At start: the key can be reached and cannot leave the KMS; the control plane may destroy it, the data plane may not.

    A key file has no rights to speak of, and the control plane need not have it at hand: nothing but a warning. Raises ConfigurationError,
    KmsUnavailable, AccessDenied where not even the rights can be asked for.
    """
    if not kms.traits.production:
        telemetry.log.warning("the KMS is a key file: losing it loses the data, a copy of it opens them", extra={"action": "start"})
        return await kms.check() if role == "data" else None
    await kms.check(destroys=role == "control")
    if role == "data" and await kms.may_destroy():
        what = "the data plane's KMS identity may destroy keys: whoever takes it over can shred everybody"
        if production:
            mend = "give the control plane an identity of its own (kms.uri_control) and take the right from this one, see docs/kms.md"
            raise ConfigurationError(what, where=f"kms: {kms.uri}", mend=mend)
        telemetry.log.warning(f"{what}; profile production refuses that", extra={"action": "start"})
