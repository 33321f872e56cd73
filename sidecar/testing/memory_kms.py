"""A KMS in memory, for tests of what uses one. It can be away, forbid, and take its time to destroy, as real ones do."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from sidecar.core.aead import AESGCM, KEY_BYTES, NONCE_BYTES, open_sealed
from sidecar.core.errors import AccessDenied, ConfigurationError, KeyShredded, KmsUnavailable
from sidecar.core.kms import KmsTraits, KmsVersion, VersionState, dedicated_name


def _utc() -> datetime:
    return datetime.now(UTC)


@dataclass
class _Version:
    secret: bytes | None = field(default_factory=lambda: os.urandom(KEY_BYTES))
    disabled: bool = False
    destroyed_at: datetime | None = None
    """Or will be: until then it can be cancelled."""


@dataclass
class Memory:
    """What the KMS holds: shared by all who open it. `away` and `may_destroy` are for tests to change."""

    delay: timedelta = timedelta(0)
    now: Callable[[], datetime] = _utc
    away: bool = False
    may_destroy: bool = True
    keys: dict[str, dict[str, _Version]] = field(default_factory=dict)


class MemoryKms:
    """One key of a `Memory`; has a first version from the start."""

    def __init__(self, memory: Memory | None = None, name: str = "kek") -> None:
        self.memory, self._name = memory or Memory(), name
        if not self.memory.keys.setdefault(name, {}):
            self._add()

    @property
    def uri(self) -> str:
        return f"memory:{self._name}"

    @property
    def traits(self) -> KmsTraits:
        delay = self.memory.delay
        return KmsTraits(provider="memory", destroys="version", delay=delay, reversible=bool(delay), outlives="nothing", takes_aad=True)

    async def wrap(self, plaintext: bytes | bytearray, aad: bytes) -> tuple[bytes, str]:
        version = await self.current()
        nonce = os.urandom(NONCE_BYTES)
        return nonce + AESGCM(self._usable(version)).encrypt(nonce, plaintext, aad), version

    async def unwrap(self, wrapped: bytes, aad: bytes, key_version: str) -> bytes:
        return open_sealed(AESGCM(self._usable(key_version)), wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], aad)

    async def check(self, *, destroys: bool = False) -> None:
        self._reach()
        if destroys and not self.memory.may_destroy:
            raise ConfigurationError("this identity may not destroy keys", where="kms")

    async def current(self) -> str:
        return [*self._versions()][-1]

    async def add_version(self) -> str:
        self._reach()
        return self._add()

    async def version(self, key_version: str, *, scheduled: datetime | None = None) -> KmsVersion:
        version = self._version(key_version)
        if version.secret is None:
            state = VersionState.DESTROYED
        elif version.destroyed_at:
            state = VersionState.PENDING
        else:
            state = VersionState.DISABLED if version.disabled else VersionState.ENABLED
        return KmsVersion(key_version=key_version, state=state, irrecoverable_at=version.destroyed_at)

    async def destroy(self, key_version: str) -> KmsVersion:
        if not self.memory.may_destroy:
            raise AccessDenied
        version = self._version(key_version)
        version.destroyed_at = version.destroyed_at or self.memory.now() + self.memory.delay
        return await self.version(key_version)

    async def may_destroy(self) -> bool:
        self._reach()
        return self.memory.may_destroy

    async def dedicated(self, tenant: str) -> "MemoryKms":
        self._reach()
        return type(self)(self.memory, dedicated_name(self._name, tenant))

    def disable(self, key_version: str, disabled: bool = True) -> None:
        self._version(key_version).disabled = disabled

    def cancel(self, key_version: str) -> None:
        """Take a scheduled destruction back."""
        self._version(key_version).destroyed_at = None

    def _reach(self) -> None:
        if self.memory.away:
            raise KmsUnavailable
        for version in (v for versions in self.memory.keys.values() for v in versions.values()):
            if version.destroyed_at and version.destroyed_at <= self.memory.now():
                version.secret = None

    def _versions(self) -> dict[str, _Version]:
        self._reach()
        return self.memory.keys[self._name]

    def _version(self, key_version: str) -> _Version:
        self._reach()
        try:
            return self._versions()[key_version]
        except KeyError:
            raise KmsUnavailable(f"{self.uri} has no key version {key_version}") from None

    def _usable(self, key_version: str) -> bytes:
        version = self._version(key_version)
        if version.secret is None:
            raise KeyShredded
        if version.disabled or version.destroyed_at:
            raise KmsUnavailable(f"key version {key_version} of {self.uri} may not be used")
        return version.secret

    def _add(self) -> str:
        versions = self.memory.keys[self._name]
        number = f"{len(versions) + 1}-{os.urandom(4).hex()}"
        versions[number] = _Version()
        return number
