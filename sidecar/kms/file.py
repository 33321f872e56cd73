"""A key in a file: for development. Losing the file loses the data; a copy of the file opens it."""

import asyncio
import os
import secrets
import stat
from hashlib import sha256
from pathlib import Path

from sidecar.core.aead import AESGCM, KEY_BYTES, NONCE_BYTES, expand, lp, open_sealed
from sidecar.core.errors import ConfigurationError, KmsUnavailable

_MAGIC = b"sidecar-kek-v1\n"


def create_key_file(path: Path) -> None:
    """A new key, mode 0600, never over an existing one. Raises FileExistsError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(_MAGIC + secrets.token_bytes(KEY_BYTES))


class FileKms:
    """AES-256-GCM under a key derived from the file's. The file is read at each use, so that its absence is seen."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    @property
    def uri(self) -> str:
        return f"file:{self._path.name}"

    async def wrap(self, plaintext: bytes, aad: bytes) -> tuple[bytes, str]:
        key, version = await asyncio.to_thread(self._read)
        nonce = os.urandom(NONCE_BYTES)
        return nonce + AESGCM(expand(key, "kms-file")).encrypt(nonce, plaintext, aad), version

    async def unwrap(self, wrapped: bytes, aad: bytes, key_version: str) -> bytes:
        key, version = await asyncio.to_thread(self._read)
        if version != key_version:
            raise KmsUnavailable(f"{self.uri} holds key version {version}, not {key_version}: put the right file back")
        return open_sealed(AESGCM(expand(key, "kms-file")), wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], aad)

    async def check(self) -> None:
        """At start a file that is not there is a mistake to mend, later it is a KMS that is away."""
        try:
            await asyncio.to_thread(self._read)
        except KmsUnavailable as error:
            mend = "restore it from your backup; for a new system `sidecar init` writes one"
            raise ConfigurationError(str(error), where=f"kms.uri: {self._path}", mend=mend) from None

    def _read(self) -> tuple[bytes, str]:
        """-> key, its version (a digest of the key: another file is another version)."""
        try:
            mode = self._path.stat().st_mode
            content = self._path.read_bytes()
        except OSError as error:
            raise KmsUnavailable(f"the key file {self._path.name} cannot be read: {error.strerror}") from None
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigurationError(f"others may read the key file (mode {stat.S_IMODE(mode):04o})", where=str(self._path), mend="chmod 0600")
        key = content.removeprefix(_MAGIC)
        if len(key) != KEY_BYTES or key == content:
            raise ConfigurationError("this is no key file", where=str(self._path), mend="`sidecar init` writes one; restore it from your backup")
        return key, sha256(lp(b"ks/kms-file/v1", key)).hexdigest()[:16]
