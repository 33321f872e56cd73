"""What a KMS says of its keys: the state of a version, what destroying one means at each provider, how a provider is named."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from hashlib import sha256
from typing import Final
from urllib.parse import parse_qsl, urlencode

from sidecar.core.aead import lp
from sidecar.core.errors import ConfigurationError


class VersionState(StrEnum):
    """Of one version of a KMS key. Only `destroyed` counts as destroyed: everything before can be taken back by somebody."""

    ENABLED = "enabled"
    DISABLED = "disabled"
    PENDING = "pending"
    """Its destruction is scheduled, and can still be cancelled."""
    DESTROYED = "destroyed"


@dataclass(frozen=True, slots=True, kw_only=True)
class KmsVersion:
    """`irrecoverable_at`: from when on nobody can use it again, as far as the KMS says; None while that is not known."""

    key_version: str
    state: VersionState
    irrecoverable_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KmsTraits:
    """What `destroy` means at a provider; feeds `irrecoverable_at`, certificates and the table of docs/kms.md."""

    provider: str
    destroys: str
    """`version`: one version of a key; `key`: whole keys only, so seal epochs are successive keys."""
    delay: timedelta
    """Between the request and the destruction; zero: at once."""
    reversible: bool
    """Whether somebody can cancel it during the delay."""
    outlives: str
    """What can still hold the key after that: said on certificates."""
    takes_aad: bool
    production: bool = True
    rights: str = ""
    """What the control plane's identity needs to destroy, for the person who grants it."""
    ran_against: str = ""
    """What this release's adapter was run against; said in the docs, so that nobody takes a stand-in for the service."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Irrecoverability:
    """`at` is None as long as the moment is not known; `reason` says what it waits for, or what it is."""

    at: datetime | None
    reason: str


def irrecoverability(traits: KmsTraits, version: KmsVersion) -> Irrecoverability:
    """From when on a KMS key version is of no use to anybody, as far as its provider can say.

    Never from a state that somebody could take back: a disabled version has no moment, a pending one has the date on which it will be
    destroyed, which is a plan, so the caller may say it but not claim it before a later answer says `destroyed`.
    """
    match version.state:
        case VersionState.DESTROYED:
            return Irrecoverability(
                at=version.irrecoverable_at, reason=f"destroyed in the KMS ({traits.provider}); may outlive it: {traits.outlives}"
            )
        case VersionState.PENDING if version.irrecoverable_at is not None:
            reversible = ", and can be cancelled until then" if traits.reversible else ""
            return Irrecoverability(at=version.irrecoverable_at, reason=f"destruction in the KMS is scheduled{reversible}")
        case VersionState.PENDING:
            return Irrecoverability(at=None, reason="destruction in the KMS is under way")
        case VersionState.DISABLED:
            return Irrecoverability(at=None, reason="disabled in the KMS, which somebody can undo")
        case VersionState.ENABLED:
            return Irrecoverability(at=None, reason="in use in the KMS")


FILE_OPTIONS: Final = frozenset({"module-path", "pin-source", "token-file", "ca-file"})
"""Options of a KMS URI that name a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KmsUri:
    """`scheme:name?option=value&…`. Secrets stand in files that options name, never in the URI."""

    scheme: str
    name: str
    options: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> "KmsUri":
        """Raises ConfigurationError for text without a scheme or a name. The name of `file:` is a path, taken as it is."""
        scheme, _, rest = text.partition(":")
        name, _, query = (rest, "", "") if scheme == "file" else rest.partition("?")
        if not (scheme and name):
            raise ConfigurationError("this is no KMS URI", where="kms.uri", mend="write PROVIDER:NAME, see docs/kms.md")
        return cls(scheme=scheme, name=name, options=dict(parse_qsl(query, keep_blank_values=True)))

    def __str__(self) -> str:
        query = urlencode(self.options, safe="/:,")
        return f"{self.scheme}:{self.name}{'?' if query else ''}{query}"

    def known(self, *names: str) -> "KmsUri":
        """Itself. Raises ConfigurationError for an option that is not among the names: a secret has none."""
        for option in self.options:
            if option not in names:
                mend = f"{self.scheme}: takes {', '.join(names) or 'no options'}; secrets stand in files"
                raise ConfigurationError(f"{option!r} is no option of {self.scheme}:", where="kms.uri", mend=mend)
        return self

    def with_files(self, resolve: Callable[[str], str]) -> "KmsUri":
        """With every path in it resolved."""
        if self.scheme == "file":
            return replace(self, name=resolve(self.name))
        return replace(self, options={n: resolve(v.removeprefix("file:")) if n in FILE_OPTIONS else v for n, v in self.options.items()})


def dedicated_name(name: str, tenant: str) -> str:
    """The name of a tenant's own key beside the common one: the tenant is not readable from it, and no two share one."""
    return f"{name}-{sha256(lp(b'ks/kms-dedicated/v1', tenant.encode())).hexdigest()[:32]}"
