"""HSMs through PKCS#11, by python-pkcs11; SoftHSM2 is what it is tested on.

    pkcs11:token=TOKEN;object=KEY?module-path=LIBRARY&pin-source=FILE        (RFC 7512; pin-env=NAME reads the PIN from the environment)

Versions are AES-256 keys of one label, told apart by CKA_ID: a counter, so that they have an order, and random bytes, so that a key that was
made again is another version. What stays of a destroyed one is a data object on the token that names it: a token that is away shows neither
key nor record, and nobody reads that as destroyed.
"""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar, Final, TypeVar

import orjson
import pkcs11
from pkcs11 import Attribute, GCMParams, KeyType, Mechanism, MechanismFlag, ObjectClass

from sidecar.core.aead import NONCE_BYTES, TAG_BYTES
from sidecar.core.errors import AccessDenied, AuthenticationFailed, ConfigurationError, KeyShredded, KmsUnavailable, SidecarError
from sidecar.core.kms import KmsTraits, KmsUri, KmsVersion, VersionState, dedicated_name

T = TypeVar("T")

TRAITS: Final = KmsTraits(
    provider="pkcs11",
    destroys="version",
    delay=timedelta(0),
    reversible=False,
    outlives="copies and backups of the token (SoftHSM2: of its folder), other members of an HSM cluster until they have followed",
    takes_aad=True,
    rights="a PIN whose user may write the token (C_GenerateKey, C_CreateObject, C_DestroyObject)",
    ran_against="SoftHSM2 2.6",
)

_APPLICATION: Final = "sidecar"
_GUARDED: Final = {
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: False,
    Attribute.ALWAYS_SENSITIVE: True,
    Attribute.NEVER_EXTRACTABLE: True,
}
"""What a key must say of itself. The last two are false for one that was imported: a copy of it is somewhere."""

ERRORS: Final[dict[type[pkcs11.PKCS11Error], type[SidecarError]]] = {
    pkcs11.PKCS11Error: KmsUnavailable,
    pkcs11.EncryptedDataInvalid: AuthenticationFailed,
    pkcs11.EncryptedDataLenRange: AuthenticationFailed,
    **dict.fromkeys(
        (pkcs11.FunctionRejected, pkcs11.SessionReadOnly, pkcs11.TokenWriteProtected, pkcs11.KeyUnextractable, pkcs11.AttributeSensitive),
        AccessDenied,
    ),
    **dict.fromkeys(
        (
            pkcs11.FunctionNotSupported,
            pkcs11.KeySizeRange,
            pkcs11.KeyTypeInconsistent,
            pkcs11.MechanismInvalid,
            pkcs11.MultipleTokensReturned,
            pkcs11.PinExpired,
            pkcs11.PinIncorrect,
            pkcs11.PinInvalid,
            pkcs11.PinLenRange,
            pkcs11.PinLocked,
            pkcs11.PinTooWeak,
            pkcs11.UserPinNotInitialized,
        ),
        ConfigurationError,
    ),
}
"""What an error of the library is for us; one that is not here is as its base class: a token that does not do its work, to be tried again."""


def mapped(error: pkcs11.PKCS11Error, uri: str) -> SidecarError:
    """What is raised in its place."""
    kind = next(ERRORS[c] for c in type(error).__mro__ if c in ERRORS)
    text = f"the token of {uri} says {type(error).__name__}"
    if kind is ConfigurationError:
        return ConfigurationError(text, where="kms.uri", mend="see docs/kms.md: PIN, mechanism AES-GCM, one token of that label")
    return kind(text)


class _Token:
    """A token's one session in this process, and the one thread in which it is used.

    PKCS#11 knows one login per token and process, whoever asks. A library that lost its token keeps answering "nothing found" after it came
    back, so whatever is not found, or fails, is tried once more with the library initialised anew.
    """

    _known: ClassVar[dict[tuple[str, str], "_Token"]] = {}
    _threads: ClassVar[dict[str, ThreadPoolExecutor]] = {}

    def __init__(self, module: str, label: str) -> None:
        self._module, self._label = module, label
        self._thread = self._threads.setdefault(module, ThreadPoolExecutor(1, "pkcs11"))
        self._session: Any = None

    @classmethod
    def of(cls, module: str, label: str) -> "_Token":
        return cls._known.setdefault((module, label), cls(module, label))

    async def run(self, pin: Callable[[], str], uri: str, act: Callable[[Any], T]) -> T:
        """`act(session)`, in the thread; the library's errors come out as ours."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, pin, uri, act)

    def _run(self, pin: Callable[[], str], uri: str, act: Callable[[Any], T]) -> T:
        for again in (True, False):
            try:
                return act(self._session or self._open(pin))
            except pkcs11.PKCS11Error as error:
                failed = mapped(error, uri)
            except KmsUnavailable as error:
                failed = error
            if not isinstance(failed, KmsUnavailable) or not again:
                break
            self._initialise_anew()
        raise failed from None

    def _open(self, pin: Callable[[], str]) -> Any:
        if not Path(self._module).exists():
            mend = "module-path: the library that came with the HSM"
            raise ConfigurationError("there is no PKCS#11 library", where=f"kms.uri: {self._module}", mend=mend)
        try:
            token = pkcs11.lib(self._module).get_token(token_label=self._label)
        except pkcs11.NoSuchToken:
            raise KmsUnavailable(f"there is no token {self._label!r}") from None
        try:
            self._session = token.open(rw=True, user_pin=pin())
        except pkcs11.UserAlreadyLoggedIn:
            self._session = token.open(rw=True)
        return self._session

    def _initialise_anew(self) -> None:
        """Ends and closes the sessions of all of its tokens; each opens a new one when it is next used."""
        for token in self._known.values():
            if token._module == self._module:
                token._session = None
        try:
            pkcs11.lib(self._module).reinitialize()
        except pkcs11.PKCS11Error:
            pkcs11.unload(self._module)


@dataclass(slots=True)
class _Handles:
    """Handles of a session, which a search costs a millisecond each. No key: a handle of a destroyed one fails, in every process."""

    session: Any = None
    keys: dict[str, Any] = field(default_factory=dict)
    newest: tuple[Any, str] | None = None
    newest_until: float = 0.0


class Pkcs11Kms:
    """Keys that never leave the token. Calls are serialised per library. A version that another process adds is seen within a second."""

    traits = TRAITS

    def __init__(self, uri: KmsUri, *, own: bool = False) -> None:
        """`own`: a tenant's, made when it is first needed."""
        uri.known("module-path", "pin-source", "pin-env")
        self._parsed, self._own = uri, own
        named = dict(part.partition("=")[::2] for part in uri.name.split(";"))
        if set(named) != {"token", "object"} or not all(named.values()):
            raise ConfigurationError("a pkcs11: URI names a token and a key", where="kms.uri", mend="pkcs11:token=TOKEN;object=KEY?module-path=…")
        if "module-path" not in uri.options:
            raise ConfigurationError("a pkcs11: URI needs module-path", where="kms.uri", mend="the HSM's library, such as …/libsofthsm2.so")
        self._token_label, self._label = named["token"], named["object"]
        # one library has one state in a process, whichever of its names it is loaded by
        self._token = _Token.of(os.path.realpath(uri.options["module-path"]), self._token_label)
        self._handles = _Handles()

    @property
    def uri(self) -> str:
        return f"pkcs11:token={self._token_label};object={self._label}"

    async def wrap(self, plaintext: bytes | bytearray, aad: bytes) -> tuple[bytes, str]:
        def act(session: Any) -> tuple[bytes, str]:
            handles = self._of(session)
            if handles.newest is None or monotonic() > handles.newest_until:
                handles.newest, handles.newest_until = self._current(session), monotonic() + 1
            key, version = handles.newest
            nonce = os.urandom(NONCE_BYTES)
            return nonce + _encrypt(key, nonce, plaintext, aad), version

        return await self._run(act)

    async def unwrap(self, wrapped: bytes, aad: bytes, key_version: str) -> bytes:
        if len(wrapped) < NONCE_BYTES + TAG_BYTES:
            raise AuthenticationFailed

        def act(session: Any) -> bytes:
            handles = self._of(session)
            if key_version not in handles.keys:
                if (gone := self._record(session, key_version)) is not None:
                    raise KeyShredded if gone.state is VersionState.DESTROYED else KmsUnavailable(f"the destruction of {key_version} is under way")
                handles.keys[key_version] = self._key(session, key_version)
            return _decrypt(handles.keys[key_version], wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], aad)

        return await self._run(act)

    async def check(self, *, destroys: bool = False) -> None:
        def act(session: Any) -> None:
            self._current(session)
            for key in _found(session, ObjectClass.SECRET_KEY, self._label):
                wrong = [a.name for a, wanted in _GUARDED.items() if key[a] is not wanted]
                if wrong:
                    what = f"key version {_name(key)} can leave the token or was outside of it: {', '.join(wrong)} is not as it must be"
                    mend = "make the key on the token, sensitive and not extractable: `sidecar kms create` does"
                    raise ConfigurationError(what, where=f"kms.uri: {self.uri}", mend=mend)

        await self._run(act)
        if destroys and not await self.may_destroy():
            raise ConfigurationError("the control plane's identity may not destroy keys", where=f"kms: {self.uri}", mend=f"it needs {TRAITS.rights}")

    async def current(self) -> str:
        return await self._run(lambda session: self._newest(session)[1])

    async def add_version(self) -> str:
        return await self._run(self._add)

    async def version(self, key_version: str, *, scheduled: datetime | None = None) -> KmsVersion:
        def act(session: Any) -> KmsVersion:
            gone = self._record(session, key_version)
            if gone is None:
                self._key(session, key_version)
            return gone or KmsVersion(key_version=key_version, state=VersionState.ENABLED)

        return await self._run(act)

    async def destroy(self, key_version: str) -> KmsVersion:
        """First the record, then the key: cut short in between it is pending, and done again."""

        def act(session: Any) -> KmsVersion:
            self._handles = _Handles()
            gone = self._record(session, key_version)
            if gone is not None and gone.state is VersionState.DESTROYED:
                return gone
            key = self._key(session, key_version)
            if gone is None:
                value = orjson.dumps({"key_version": key_version, "destroyed_at": datetime.now(UTC).isoformat()})
                kind = {Attribute.CLASS: ObjectClass.DATA, Attribute.TOKEN: True, Attribute.PRIVATE: True, Attribute.APPLICATION: _APPLICATION}
                session.create_object(kind | {Attribute.LABEL: self._label, Attribute.VALUE: value})
            key.destroy()
            done = self._record(session, key_version)
            if done is None:
                raise KmsUnavailable(f"the token of {self.uri} keeps no record of what it destroyed")
            return done

        return await self._run(act)

    async def may_destroy(self) -> bool:
        """Tried on a key of its own making: what a PIN may do is the HSM's to say, and only by doing."""

        def act(session: Any) -> bool:
            self._current(session)
            try:
                _generate(session, f"{self._label}.probe", os.urandom(8)).destroy()
            except (pkcs11.GeneralError, pkcs11.FunctionFailed):
                return False  # SoftHSM2, on files that this user may not write: reading has just worked
            except pkcs11.PKCS11Error as error:
                if isinstance(mapped(error, self.uri), AccessDenied | ConfigurationError) or isinstance(error, pkcs11.UserNotLoggedIn):
                    return False
                raise
            return True

        return await self._run(act)

    async def dedicated(self, tenant: str) -> "Pkcs11Kms":
        name = f"token={self._token_label};object={dedicated_name(self._label, tenant)}"
        return Pkcs11Kms(KmsUri(scheme="pkcs11", name=name, options=self._parsed.options), own=True)

    # below: in the token's thread

    async def _run(self, act: Callable[[Any], T]) -> T:
        return await self._token.run(self._pin, self.uri, act)

    def _of(self, session: Any) -> _Handles:
        if self._handles.session is not session:
            self._handles = _Handles(session)
        return self._handles

    def _pin(self) -> str:
        source, name = self._parsed.options.get("pin-source"), self._parsed.options.get("pin-env")
        try:
            return Path(source).read_text().strip() if source else os.environ[name or ""]
        except (OSError, KeyError, UnicodeDecodeError):
            mend = "pin-source=FILE or pin-env=NAME in the URI, readable by this process"
            raise ConfigurationError("the PIN cannot be read", where=f"kms.uri: {source or name or self.uri}", mend=mend) from None

    def _records(self, session: Any) -> dict[str, datetime]:
        said = [
            orjson.loads(bytes(o[Attribute.VALUE])) for o in _found(session, ObjectClass.DATA, self._label, {Attribute.APPLICATION: _APPLICATION})
        ]
        return {one["key_version"]: datetime.fromisoformat(one["destroyed_at"]) for one in said}

    def _record(self, session: Any, key_version: str) -> KmsVersion | None:
        """What the record says; as long as the key is there as well (a restored copy), the destruction is not done."""
        at = self._records(session).get(key_version)
        if at is None:
            return None
        if any(_name(key) == key_version for key in _found(session, ObjectClass.SECRET_KEY, self._label)):
            return KmsVersion(key_version=key_version, state=VersionState.PENDING)
        return KmsVersion(key_version=key_version, state=VersionState.DESTROYED, irrecoverable_at=at)

    def _newest(self, session: Any) -> tuple[Any, str]:
        """-> the key, None if it is destroyed; its name."""
        keys = {_name(key): key for key in _found(session, ObjectClass.SECRET_KEY, self._label)}
        newest = max([*keys, *self._records(session)], key=_order, default=None)
        if newest is not None:
            return keys.get(newest), newest
        if not self._own:
            raise KmsUnavailable(f"{self.uri} has no key")
        self._add(session)
        return self._newest(session)

    def _current(self, session: Any) -> tuple[Any, str]:
        """Never an older one than the newest: that would go back to a seal epoch that is over."""
        key, name = self._newest(session)
        if key is None:
            raise KmsUnavailable(f"the newest version of {self.uri} is destroyed: add one")
        return key, name

    def _key(self, session: Any, key_version: str) -> Any:
        for key in _found(session, ObjectClass.SECRET_KEY, self._label):
            if _name(key) == key_version:
                return key
        raise KmsUnavailable(f"{self.uri} has no key version {key_version}, nor a record that it was destroyed")

    def _add(self, session: Any) -> str:
        names = [_name(key) for key in _found(session, ObjectClass.SECRET_KEY, self._label)] + [*self._records(session)]
        counter = max([_order(name)[0] for name in names], default=0) + 1
        self._handles = _Handles()
        return _name(_generate(session, self._label, counter.to_bytes(4, "big") + os.urandom(8)))


def _name(key: Any) -> str:
    return bytes(key[Attribute.ID]).hex() or "0"


def _order(key_version: str) -> tuple[int, str]:
    """By our counter; a key that somebody made with an id of another form comes before all of ours."""
    return (int(key_version[:8], 16), key_version) if len(key_version) == 24 else (0, key_version)


def _found(session: Any, kind: ObjectClass, label: str, more: dict[Attribute, Any] | None = None) -> list[Any]:
    return list(session.get_objects({Attribute.CLASS: kind, Attribute.LABEL: label, **(more or {})}))


def _generate(session: Any, label: str, identity: bytes) -> Any:
    template = {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False, Attribute.PRIVATE: True}
    uses = MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT
    return session.generate_key(KeyType.AES, 256, label=label, id=identity, store=True, capabilities=uses, template=template)


def _gcm(nonce: bytes, aad: bytes) -> dict[str, Any]:
    return {"mechanism": Mechanism.AES_GCM, "mechanism_param": GCMParams(nonce, aad, TAG_BYTES * 8)}


def _encrypt(key: Any, nonce: bytes, plaintext: bytes | bytearray, aad: bytes) -> bytes:
    return bytes(key.encrypt(bytes(plaintext), **_gcm(nonce, aad)))


def _decrypt(key: Any, nonce: bytes, sealed: bytes, aad: bytes) -> bytes:
    """SoftHSM2 says GeneralError for altered bytes and for a token that is away: whether the key works tells the two apart."""
    try:
        return bytes(key.decrypt(sealed, **_gcm(nonce, aad)))
    except pkcs11.GeneralError:
        probe = os.urandom(NONCE_BYTES)
        key.decrypt(_encrypt(key, probe, b"probe", b""), **_gcm(probe, b""))
        raise AuthenticationFailed from None
