"""The seams. A flow sees these Protocols; adapters and the memory twins in `sidecar.testing` implement them."""

from datetime import datetime
from typing import Protocol


class Kms(Protocol):
    """Holds the key that never leaves it. Every call may raise KmsUnavailable; nobody reads that as erased."""

    @property
    def uri(self) -> str:
        """Which KMS and key, without secrets: stored in tenant_keys.kms_uri."""

    async def wrap(self, plaintext: bytes, aad: bytes) -> tuple[bytes, str]:
        """-> (ciphertext, version of the KMS key that wraps it: the seal epoch)."""

    async def unwrap(self, wrapped: bytes, aad: bytes, key_version: str) -> bytes:
        """The plaintext. Raises AuthenticationFailed for altered bytes, KeyShredded when the version is destroyed."""

    async def check(self) -> None:
        """Reaches the key or raises; called at start and by the readiness probe."""


class Clock(Protocol):
    def now(self) -> datetime:
        """Aware, in UTC."""
