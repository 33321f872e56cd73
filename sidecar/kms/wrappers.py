"""Metrics, a bound on the time of a call, and patience: wrappers of `ports.Kms`, so that no provider has options for them.

There is no wrapper that keeps unwrapped keys: a cache without an owner who empties it decrypts after the key is gone. What may be kept, and
until when, is decided where a shred can reach it: `streams.py`, which drops with the tenant's epoch.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from time import perf_counter
from typing import Final, TypeVar

from sidecar import telemetry
from sidecar.core.errors import AccessDenied, AuthenticationFailed, ConfigurationError, KeyShredded, KmsUnavailable, SidecarError
from sidecar.core.kms import KmsTraits, KmsVersion
from sidecar.ports import Kms

T = TypeVar("T")

CALL_SECONDS: Final = 10.0
"""A call that takes longer counts as unavailable. Longer than any provider's own bound for one request."""
PAUSES: Final = (0.05, 0.25)
"""Seconds before the second and the third attempt. Whoever calls has a longer patience of its own: a partition waits, a command is retried."""


class Watched:
    """Every call through one place, `_call`: counted, timed, bounded, tried again when the KMS is away."""

    def __init__(self, kms: Kms, *, call_seconds: float = CALL_SECONDS, pauses: tuple[float, ...] = PAUSES) -> None:
        self._kms, self._call_seconds, self._pauses = kms, call_seconds, pauses

    @property
    def uri(self) -> str:
        return self._kms.uri

    @property
    def traits(self) -> KmsTraits:
        return self._kms.traits

    async def wrap(self, plaintext: bytes | bytearray, aad: bytes) -> tuple[bytes, str]:
        return await self._call("wrap", lambda: self._kms.wrap(plaintext, aad))

    async def unwrap(self, wrapped: bytes, aad: bytes, key_version: str) -> bytes | bytearray:
        return await self._call("unwrap", lambda: self._kms.unwrap(wrapped, aad, key_version))

    async def check(self, *, destroys: bool = False) -> None:
        await self._call("check", lambda: self._kms.check(destroys=destroys))

    async def current(self) -> str:
        return await self._call("current", self._kms.current)

    async def add_version(self) -> str:
        """Not tried again: the outcome of a call that failed is unknown, and a second version would be made."""
        return await self._call("add_version", self._kms.add_version, again=False)

    async def version(self, key_version: str, *, scheduled: datetime | None = None) -> KmsVersion:
        return await self._call("version", lambda: self._kms.version(key_version, scheduled=scheduled))

    async def destroy(self, key_version: str) -> KmsVersion:
        return await self._call("destroy", lambda: self._kms.destroy(key_version))

    async def may_destroy(self) -> bool:
        return await self._call("may_destroy", self._kms.may_destroy)

    async def dedicated(self, tenant: str) -> "Watched":
        own = await self._call("dedicated", lambda: self._kms.dedicated(tenant))
        return Watched(own, call_seconds=self._call_seconds, pauses=self._pauses)

    async def _call(self, operation: str, ask: Callable[[], Awaitable[T]], *, again: bool = True) -> T:
        for pause in (*self._pauses, None) if again else (None,):
            started = perf_counter()
            try:
                async with asyncio.timeout(self._call_seconds):
                    return await ask()
            except TimeoutError:
                error: SidecarError = KmsUnavailable(f"{self.uri} did not answer {operation} within {self._call_seconds:g} s")
            except SidecarError as raised:
                error = self._as_it_counts(operation, raised)
            finally:
                telemetry.kms_seconds.labels(operation).observe(perf_counter() - started)
            telemetry.kms_errors.labels(operation).inc()
            if pause is None or not isinstance(error, KmsUnavailable):
                break
            await asyncio.sleep(pause)
        raise error from None

    def _as_it_counts(self, operation: str, error: SidecarError) -> SidecarError:
        """For a record a right that was taken away is a KMS that is away: it waits until somebody gives it back."""
        if operation in ("wrap", "unwrap") and not isinstance(error, AuthenticationFailed | KeyShredded | ConfigurationError | KmsUnavailable):
            what = "does not let this identity" if isinstance(error, AccessDenied) else type(error).__name__
            return KmsUnavailable(f"{self.uri}: {what} {operation}")
        return error
