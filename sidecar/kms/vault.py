"""HashiCorp Vault and OpenBao: the Transit engine, by hvac.

    vault:MOUNT/KEY?address=https://…&namespace=…&token-file=FILE&ca-file=FILE        (else $VAULT_ADDR, $VAULT_NAMESPACE, $VAULT_TOKEN)

A version is `NUMBER@CREATED`: the same number of a key that was deleted and made again is another version. Transit destroys from the oldest
version on: `min_decryption_version` forbids versions (anybody with the right can allow them again: not destroyed), `trim` removes those that
are forbidden (for good). The newest version can only be trimmed once there is a newer one, so destroying it rotates first; the emptied key
stays as the record of what was destroyed. A key that is not found was never destroyed, as far as we know.
"""

import asyncio
import os
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Any, Final, TypeVar

import hvac
import requests
from hvac import exceptions

from sidecar.core.errors import AccessDenied, AuthenticationFailed, ConfigurationError, KeyShredded, KmsUnavailable, SidecarError
from sidecar.core.kms import KmsTraits, KmsUri, KmsVersion, VersionState, dedicated_name

T = TypeVar("T")

TRAITS: Final = KmsTraits(
    provider="vault",
    destroys="version",
    delay=timedelta(0),
    reversible=False,
    outlives="snapshots and backups of the server's storage, key backups (`transit/backup`, refused at start where they are plaintext)",
    takes_aad=True,
    rights="update on keys/KEY/rotate, keys/KEY/config and keys/KEY/trim, read on keys/KEY; deletion_allowed=true on the key",
    ran_against="a Transit server of ours (sidecar.testing.transit_server); not HashiCorp's or OpenBao's",
)

SECONDS: Final = 5.0
"""For one request."""

ERRORS: Final[dict[type[Exception], type[SidecarError]]] = {
    requests.RequestException: KmsUnavailable,
    exceptions.VaultError: KmsUnavailable,
    exceptions.Forbidden: AccessDenied,
    exceptions.Unauthorized: AccessDenied,
    exceptions.UnsupportedOperation: ConfigurationError,
    exceptions.ParamValidationError: ConfigurationError,
}
"""What an error of the library is for us; one that is not here is as its base class. A request that Vault finds invalid is looked into."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Key:
    """What Transit says of a key."""

    latest: int
    min_available: int
    min_decryption: int
    min_encryption: int
    created: dict[int, int]
    deletion_allowed: bool
    raw: dict[str, Any]

    def name(self, number: int) -> str:
        return f"{number}@{self.created[number]}"

    def state(self, key_version: str) -> VersionState | None:
        """None: not a version of this key."""
        number, _, created = key_version.partition("@")
        if not (number.isdigit() and 1 <= int(number) <= self.latest):
            return None
        if int(number) < self.min_available:
            return VersionState.DESTROYED
        if int(number) < self.min_decryption:
            return VersionState.DISABLED
        return VersionState.ENABLED if str(self.created.get(int(number))) == created else None


class VaultKms:
    """A key of a Transit engine. A version that another process adds is seen within a second."""

    traits = TRAITS

    def __init__(self, uri: KmsUri, *, client: Any = None, own: bool = False) -> None:
        """`client`: another's, whose connections this one shares. `own`: a tenant's key, made when it is first needed."""
        uri.known("address", "namespace", "token-file", "ca-file")
        self._mount, _, self._name = uri.name.rpartition("/")
        if not (self._mount and self._name):
            raise ConfigurationError("a vault: URI names a mount and a key", where="kms.uri", mend="vault:transit/sidecar?address=https://…")
        self._parsed, self._own = uri, own
        self._namespace = uri.options.get("namespace", os.environ.get("VAULT_NAMESPACE", ""))
        address = uri.options.get("address") or os.environ.get("VAULT_ADDR")
        if not address:
            raise ConfigurationError("a vault: URI needs an address", where="kms.uri", mend="?address=https://…, or $VAULT_ADDR")
        verify: str | bool = uri.options.get("ca-file") or True
        self._client = client or hvac.Client(url=address, namespace=self._namespace or None, verify=verify, timeout=SECONDS)
        self._seen: tuple[_Key, float] | None = None

    @property
    def uri(self) -> str:
        return f"vault:{self._mount}/{self._name}{f'?namespace={self._namespace}' if self._namespace else ''}"

    async def wrap(self, plaintext: bytes | bytearray, aad: bytes) -> tuple[bytes, str]:
        key = await self._lately()
        said = await self._call("encrypt_data", plaintext=_text(plaintext), associated_data=_text(aad), key_version=key.latest)
        return str(said["data"]["ciphertext"]).encode(), key.name(key.latest)

    async def unwrap(self, wrapped: bytes, aad: bytes, key_version: str) -> bytes:
        number = key_version.partition("@")[0]
        text = wrapped.decode("ascii", "replace")
        if not text.startswith(f"vault:v{number}:"):
            raise AuthenticationFailed
        try:
            said = await self._call("decrypt_data", ciphertext=text, associated_data=_text(aad))
        except _Invalid:
            # Whether it is the version or the bytes that Transit will not have, is to be seen from the key, not from the text of an error.
            match (await self._key()).state(key_version):
                case VersionState.DESTROYED:
                    raise KeyShredded from None
                case VersionState.ENABLED:
                    raise AuthenticationFailed from None
                case state:
                    why = "is forbidden by min_decryption_version" if state else "is none of its versions: another key, or an older copy of it"
                    raise KmsUnavailable(f"key version {key_version} of {self.uri} {why}") from None
        return b64decode(said["data"]["plaintext"])

    async def check(self, *, destroys: bool = False) -> None:
        where = f"kms.uri: {self.uri}"
        try:
            raw = (await self._key()).raw
        except _Missing as error:
            raise ConfigurationError(str(error), where=where, mend="`sidecar kms create`, or vault write -f MOUNT/keys/KEY") from None
        if raw["type"] != "aes256-gcm96" or raw["derived"]:
            raise ConfigurationError(f"the key is of type {raw['type']}", where=where, mend="make one of type aes256-gcm96, not derived")
        for flag in ("exportable", "allow_plaintext_backup", "imported_key"):
            if raw.get(flag):
                mend = "make a new key without it: it cannot be taken back from this one; then `sidecar keys roll-epoch`"
                raise ConfigurationError(f"the key can leave Vault or was outside of it: {flag} is set", where=where, mend=mend)
        if destroys:
            await self._check_destroys(raw, where)

    async def current(self) -> str:
        key = await self._made()
        return key.name(key.latest)

    async def add_version(self) -> str:
        """A new key, where there is none."""
        try:
            await self._key()
            await self._call("rotate_key")
        except _Missing:
            await self._call("create_key", key_type="aes256-gcm96")
            if not self._own:
                await self._call("update_key_configuration", deletion_allowed=True)
        return await self.current()

    async def version(self, key_version: str, *, scheduled: datetime | None = None) -> KmsVersion:
        state = (await self._key()).state(key_version)
        if state is None:
            raise KmsUnavailable(f"{self.uri} has no key version {key_version}")
        return KmsVersion(key_version=key_version, state=state)

    async def destroy(self, key_version: str) -> KmsVersion:
        """Only from the oldest on: of a version that has older ones before it nothing is done, and its state says so.

        `deletion_allowed: false` is how Vault's administrators say that nothing of a key may go. `trim` itself does not look at it; we do.
        """
        now = await self.version(key_version)
        number, key = int(key_version.partition("@")[0]), await self._key()
        if now.state is VersionState.DESTROYED or number > max(key.min_available, 1):
            return now
        if not key.deletion_allowed:
            if not self._own:
                raise AccessDenied(f"{self.uri} has deletion_allowed=false")
            await self._call("update_key_configuration", deletion_allowed=True)
        if number == key.latest:
            await self._call("rotate_key")
        # one at a time: hvac refuses the two together where they are equal
        await self._call("update_key_configuration", min_encryption_version=max(key.min_encryption, number + 1))
        await self._call("update_key_configuration", min_decryption_version=max(key.min_decryption, number + 1))
        await self._call("trim_key", min_version=number + 1)
        return replace(await self.version(key_version), irrecoverable_at=datetime.now(UTC))

    async def may_destroy(self) -> bool:
        """Trim versions or delete the key, this one or a tenant's."""
        rights = await self._rights(*(f"{name}{what}" for name in (self._name, dedicated_name(self._name, "any")) for what in ("", "/trim")))
        return any(may & {"root", "sudo", "update" if path.endswith("/trim") else "delete"} for path, may in rights.items())

    async def dedicated(self, tenant: str) -> "VaultKms":
        name = f"{self._mount}/{dedicated_name(self._name, tenant)}"
        return VaultKms(replace(self._parsed, name=name), client=self._client, own=True)

    async def _check_destroys(self, raw: dict[str, Any], where: str) -> None:
        if not raw["deletion_allowed"]:
            mend = "vault write MOUNT/keys/KEY/config deletion_allowed=true"
            raise ConfigurationError("the key does not allow deletion, so nothing of it is ever destroyed", where=where, mend=mend)
        rights = await self._rights(*(f"{self._name}/{what}" for what in ("rotate", "config", "trim")))
        missing = [path for path, may in rights.items() if not may & {"root", "sudo", "update"}]
        if missing:
            what = f"the control plane's token may not destroy: it lacks update on {', '.join(missing)}"
            raise ConfigurationError(what, where=where, mend=f"its policy needs {TRAITS.rights}")

    async def _rights(self, *paths: str) -> dict[str, set[str]]:
        full = [f"{self._mount}/keys/{path}" for path in paths]
        said = await self._send(lambda client: client.sys.get_capabilities(paths=full))
        return {path: set((said.get("data") or said)[path]) for path in full}

    async def _lately(self) -> _Key:
        if self._seen is None or monotonic() > self._seen[1]:
            self._seen = (await self._made(), monotonic() + 1)
        return self._seen[0]

    async def _made(self) -> _Key:
        try:
            return await self._key()
        except _Missing:
            if not self._own:
                raise
        await self._call("create_key", key_type="aes256-gcm96")
        return await self._key()

    async def _key(self) -> _Key:
        raw = (await self._call("read_key"))["data"]
        return _Key(
            latest=raw["latest_version"],
            min_available=raw["min_available_version"],
            min_decryption=raw["min_decryption_version"],
            min_encryption=raw["min_encryption_version"],
            created={int(number): created for number, created in raw["keys"].items()} if raw["type"] == "aes256-gcm96" else {},
            deletion_allowed=raw["deletion_allowed"],
            raw=raw,
        )

    async def _call(self, method: str, **arguments: Any) -> Any:
        """A method of hvac's Transit on this key."""
        if method in ("rotate_key", "update_key_configuration", "trim_key"):
            self._seen = None
        return await self._send(lambda client: getattr(client.secrets.transit, method)(name=self._name, mount_point=self._mount, **arguments))

    async def _send(self, ask: Callable[[Any], T]) -> T:
        def send() -> T:
            self._client.token = self._secret()  # read at each use: an agent renews it
            try:
                return ask(self._client)
            except (exceptions.VaultError, requests.RequestException) as error:
                raise mapped(error, self.uri) from None

        return await asyncio.to_thread(send)

    def _secret(self) -> str:
        file = self._parsed.options.get("token-file")
        try:
            return Path(file).read_text().strip() if file else os.environ["VAULT_TOKEN"]
        except (OSError, KeyError, UnicodeDecodeError):
            raise KmsUnavailable(f"the token of {self.uri} cannot be read: token-file in its URI, or $VAULT_TOKEN") from None


class _Invalid(KmsUnavailable):
    """Vault finds the request invalid."""


class _Missing(KmsUnavailable):
    """Vault knows no such key."""


def mapped(error: Exception, uri: str) -> SidecarError:
    """No text of the library's: it quotes URLs and answers."""
    text = f"{uri}: {type(error).__name__}"
    if isinstance(error, exceptions.InvalidRequest):
        return _Invalid(text)
    if isinstance(error, exceptions.InvalidPath):
        return _Missing(f"{uri}: there is no such key")
    kind = next(ERRORS[c] for c in type(error).__mro__ if c in ERRORS)
    return ConfigurationError(text, where="kms.uri", mend="see docs/kms.md") if kind is ConfigurationError else kind(text)


def _text(value: bytes | bytearray) -> str:
    return b64encode(value).decode()
