"""What a KMS says of its keys: the state of a version, and what destroying one means at each provider."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from hashlib import sha256

from sidecar.core.aead import lp


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
    """What `destroy` means at a provider; feeds `irrecoverable_at`, certificates and the docs."""

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


def dedicated_name(name: str, tenant: str) -> str:
    """The name of a tenant's own key beside the common one: the tenant is not readable from it, and no two share one."""
    return f"{name}-{sha256(lp(b'ks/kms-dedicated/v1', tenant.encode())).hexdigest()[:32]}"
