"""Keys in files: for development. Losing one loses the data; a copy of one opens them.

    kek           the first version      kek.2, kek.3 …        its successors; the highest is the current one
    kek.destroyed                        what stays of a version: its name and when it was destroyed
    kek-HASH …                           a tenant's own key (`dedicated`), with versions of its own

A version is named by a digest of its key, so another file in its place is another version.
"""

import asyncio
import os
import re
import secrets
import stat
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Final

import orjson

from sidecar.core.aead import AESGCM, KEY_BYTES, NONCE_BYTES, TAG_BYTES, expand, lp, open_into
from sidecar.core.errors import AuthenticationFailed, ConfigurationError, KeyShredded, KmsUnavailable
from sidecar.core.kms import KmsTraits, KmsUri, KmsVersion, VersionState, dedicated_name

_MAGIC = b"sidecar-kek-v1\n"

TRAITS: Final = KmsTraits(
    provider="file",
    destroys="version",
    delay=timedelta(0),
    reversible=False,
    outlives="copies and backups of the file; what a copy-on-write file system or a flash disk keeps of overwritten blocks",
    takes_aad=True,
    production=False,
    rights="write permission on the folder of the key file",
    ran_against="itself",
)


def create_key_file(path: Path) -> None:
    """A new key, mode 0600, never over an existing one. Raises FileExistsError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write_new(path, _MAGIC + secrets.token_bytes(KEY_BYTES))


@dataclass(frozen=True, slots=True)
class _Slot:
    """A version's place: its key file, and the record of its destruction beside it."""

    path: Path

    @property
    def record(self) -> Path:
        return self.path.with_name(f"{self.path.name}.destroyed")

    def destroyed(self) -> KmsVersion | None:
        """What the record says; as long as the key file is there as well, the destruction is not done."""
        try:
            said = orjson.loads(self.record.read_bytes())
        except FileNotFoundError:
            return None
        if self.path.exists():
            return KmsVersion(key_version=said["key_version"], state=VersionState.PENDING)
        at = datetime.fromisoformat(said["destroyed_at"])
        return KmsVersion(key_version=said["key_version"], state=VersionState.DESTROYED, irrecoverable_at=at)

    def destroy(self, key_version: str) -> None:
        """First the record, then the bytes: cut short in between it is pending, and done again."""
        if not self.record.exists():
            _write_new(self.record, orjson.dumps({"key_version": key_version, "destroyed_at": datetime.now(UTC).isoformat()}))
        with self.path.open("r+b") as file:
            file.write(bytes(self.path.stat().st_size))
            file.flush()
            os.fsync(file.fileno())
        self.path.unlink()
        _sync_folder(self.path.parent)

    def read(self) -> tuple[bytes, str]:
        """-> key, its version."""
        try:
            mode = self.path.stat().st_mode
            content = self.path.read_bytes()
        except OSError as error:
            raise KmsUnavailable(f"the key file {self.path.name} cannot be read: {error.strerror}") from None
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigurationError(f"others may read the key file (mode {stat.S_IMODE(mode):04o})", where=str(self.path), mend="chmod 0600")
        key = content.removeprefix(_MAGIC)
        if self.record.exists():
            raise KmsUnavailable(f"the destruction of the key file {self.path.name} is under way")
        if len(key) != KEY_BYTES or key == content:
            raise ConfigurationError("this is no key file", where=str(self.path), mend="`sidecar init` writes one; restore it from your backup")
        return key, sha256(lp(b"ks/kms-file/v1", key)).hexdigest()[:16]


class FileKms:
    """AES-256-GCM under a key derived from the file's. The files are read at each use, so that their absence is seen."""

    traits = TRAITS

    def __init__(self, uri: KmsUri | str, *, own: bool = False) -> None:
        """`own`: a tenant's, made when it is first needed."""
        self._path, self._own = Path(uri.name if isinstance(uri, KmsUri) else uri), own

    @property
    def uri(self) -> str:
        return f"file:{self._path.name}"

    async def wrap(self, plaintext: bytes | bytearray, aad: bytes) -> tuple[bytes, str]:
        key, version = await asyncio.to_thread(self._current)
        nonce = os.urandom(NONCE_BYTES)
        return nonce + AESGCM(expand(key, "kms-file")).encrypt(nonce, plaintext, aad), version

    async def unwrap(self, wrapped: bytes, aad: bytes, key_version: str) -> bytes | bytearray:
        key = await asyncio.to_thread(self._key, key_version)
        if len(wrapped) < NONCE_BYTES + TAG_BYTES:
            raise AuthenticationFailed
        out = bytearray(len(wrapped) - NONCE_BYTES - TAG_BYTES)
        open_into(AESGCM(expand(key, "kms-file")), wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], aad, out)
        return out

    async def check(self, *, destroys: bool = False) -> None:
        """At start a file that is not there is a mistake to mend, later it is a KMS that is away."""
        if destroys and not await self.may_destroy():
            raise ConfigurationError("the control plane may not destroy keys", where=f"kms: {self._path}", mend=f"it needs {TRAITS.rights}")
        try:
            await asyncio.to_thread(self._current)
        except KmsUnavailable as error:
            mend = "restore it from your backup; for a new system `sidecar init` writes one"
            raise ConfigurationError(str(error), where=f"kms.uri: {self._path}", mend=mend) from None

    async def current(self) -> str:
        def name() -> str:
            newest = self._newest()
            gone = newest.destroyed()
            return gone.key_version if gone else newest.read()[1]

        return await asyncio.to_thread(name)

    async def add_version(self) -> str:
        return await asyncio.to_thread(self._add)

    async def version(self, key_version: str, *, scheduled: datetime | None = None) -> KmsVersion:
        return (await asyncio.to_thread(self._find, key_version))[1]

    async def destroy(self, key_version: str) -> KmsVersion:
        return await asyncio.to_thread(self._destroy, key_version)

    async def may_destroy(self) -> bool:
        """Whoever may write the folder."""
        return await asyncio.to_thread(os.access, self._path.parent, os.W_OK)

    async def dedicated(self, tenant: str) -> "FileKms":
        return FileKms(str(self._path.with_name(dedicated_name(self._path.name, tenant))), own=True)

    def _slots(self) -> list[tuple[int, _Slot]]:
        """Every version that is or was, oldest first, by number."""
        pattern = re.compile(rf"{re.escape(self._path.name)}(?:\.(\d+))?(?:\.destroyed)?")
        try:
            found = {int(m[1] or 1) for name in os.listdir(self._path.parent) if (m := pattern.fullmatch(name))}
        except OSError as error:
            raise KmsUnavailable(f"the folder of the key file {self._path.name} cannot be read: {error.strerror}") from None
        return [(n, _Slot(self._path if n == 1 else self._path.with_name(f"{self._path.name}.{n}"))) for n in sorted(found)]

    def _newest(self) -> _Slot:
        slots = self._slots()
        if not slots and self._own:
            self._add()
        return slots[-1][1] if slots else _Slot(self._path)

    def _current(self) -> tuple[bytes, str]:
        """Never an older one than the newest: that would go back to a seal epoch that is over."""
        newest = self._newest()
        if newest.destroyed() is not None:
            raise KmsUnavailable(f"the newest version of {self.uri} is destroyed: add one")
        return newest.read()

    def _find(self, key_version: str) -> tuple[_Slot, KmsVersion]:
        """Raises KmsUnavailable for a version of which there is neither key nor record."""
        unreadable = []
        for _, slot in self._slots():
            try:
                found = slot.destroyed() or KmsVersion(key_version=slot.read()[1], state=VersionState.ENABLED)
            except KmsUnavailable as error:
                unreadable.append(str(error))
                continue
            if found.key_version == key_version:
                return slot, found
        raise KmsUnavailable("; ".join([f"{self.uri} holds no key version {key_version}: put the right file back", *unreadable]))

    def _key(self, key_version: str) -> bytes:
        slot, found = self._find(key_version)
        if found.state is VersionState.DESTROYED:
            raise KeyShredded
        if found.state is VersionState.PENDING:
            raise KmsUnavailable(f"the destruction of key version {key_version} of {self.uri} is under way")
        return slot.read()[0]

    def _add(self) -> str:
        number = max((n for n, _ in self._slots()), default=0) + 1
        path = self._path if number == 1 else self._path.with_name(f"{self._path.name}.{number}")
        try:
            create_key_file(path)
        except FileExistsError:
            raise KmsUnavailable(f"somebody else is adding a version to {self.uri}") from None
        except OSError as error:
            raise KmsUnavailable(f"the key file {path.name} cannot be written: {error.strerror}") from None
        return _Slot(path).read()[1]

    def _destroy(self, key_version: str) -> KmsVersion:
        slot, found = self._find(key_version)
        if found.state is VersionState.DESTROYED:
            return found
        try:
            slot.destroy(key_version)
        except OSError as error:
            raise KmsUnavailable(f"the key file {slot.path.name} cannot be destroyed: {error.strerror}") from None
        return self._find(key_version)[1]


def _write_new(path: Path, content: bytes) -> None:
    """Mode 0600, there whole or not at all and on disk when it returns, never over an existing file."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)
    finally:
        draft.unlink()
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
