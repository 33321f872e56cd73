"""The seams. A flow sees these Protocols; adapters and the memory twins in `sidecar.testing` implement them."""

from datetime import datetime
from typing import Protocol

from sidecar.core.kms import KmsTraits, KmsVersion


class Kms(Protocol):
    """Holds the key that never leaves it. Every call may raise KmsUnavailable; nobody reads that as erased.

    A seal epoch is what `wrap` names: a version of one key, or, where versions cannot be destroyed, one of successive keys.
    """

    @property
    def uri(self) -> str:
        """Which KMS and key, without secrets: stored in tenant_keys.kms_uri and seal_epochs.kms_uri."""

    @property
    def traits(self) -> KmsTraits:
        """What destroying means at this provider."""

    async def wrap(self, plaintext: bytes, aad: bytes) -> tuple[bytes, str]:
        """-> (ciphertext, version of the KMS key that wraps it: the seal epoch)."""

    async def unwrap(self, wrapped: bytes, aad: bytes, key_version: str) -> bytes:
        """The plaintext. Raises AuthenticationFailed for altered bytes, KeyShredded only when the version is destroyed for good."""

    async def check(self) -> None:
        """Reaches the key or raises; called at start and by the readiness probe. Refuses a key that can leave the KMS."""

    async def current(self) -> str:
        """The version that `wrap` uses now."""

    async def add_version(self) -> str:
        """A new seal epoch, which `wrap` uses from now on. Raises AccessDenied without the right to."""

    async def version(self, key_version: str) -> KmsVersion:
        """Where a version stands."""

    async def destroy(self, key_version: str) -> KmsVersion:
        """Ask for its destruction; repeatable. What came of it is in the answer's `state`: only `destroyed` is destroyed."""

    async def may_destroy(self) -> bool:
        """Has this identity the right to destroy? The control plane must have it, the data plane must not."""

    async def dedicated(self, tenant: str) -> "Kms":
        """The same provider on a key of this tenant alone, made if there is none."""


class Clock(Protocol):
    def now(self) -> datetime:
        """Aware, in UTC."""
