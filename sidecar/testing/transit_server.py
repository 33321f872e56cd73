"""A Transit server for tests: ours, not HashiCorp's or OpenBao's. Faithful in states and refusals, not in anything else.

    async with transit_server() as server:
        server.address, server.root                       URL, a token that may do everything
        server.grant({"transit/keys/sidecar": {"read"}})  a token of a policy
        server.sealed = True                              503 to everything

It keeps what Transit keeps: versions from `min_available_version` on, also those that `min_decryption_version` forbids (lowering it allows
them again); `trim` drops them for good; a key that does not exist is made by `encrypt` where the policy says `create`; the two flags that let
a key out can be set and never taken back.
"""

import asyncio
import json
import re
import secrets
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from cryptography.exceptions import InvalidTag

from sidecar.core.aead import AESGCM, NONCE_BYTES

Grants = Mapping[str, set[str]]
"""Path as in a policy (`+` is one segment, `*` at the end anything) → capabilities."""


class _Refused(Exception):
    def __init__(self, status: int, *errors: str) -> None:
        self.status, self.errors = status, errors


@dataclass
class TransitKey:
    name: str
    type: str = "aes256-gcm96"
    exportable: bool = False
    allow_plaintext_backup: bool = False
    imported_key: bool = False
    deletion_allowed: bool = False
    derived: bool = False
    min_available_version: int = 0
    min_decryption_version: int = 1
    min_encryption_version: int = 0
    versions: dict[int, tuple[bytes, int]] = field(default_factory=dict)
    """Number → key, created (Unix seconds)."""

    @property
    def latest_version(self) -> int:
        return max(self.versions)

    def rotate(self) -> None:
        number = max(self.versions, default=0) + 1
        self.versions[number] = (secrets.token_bytes(32), int(time.time()))

    def describe(self) -> dict[str, Any]:
        keys = {str(number): created for number, (_, created) in self.versions.items() if number >= self.min_decryption_version}
        plain = {name: value for name, value in vars(self).items() if name != "versions"}
        return plain | {"latest_version": self.latest_version, "keys": keys}

    def configure(self, wanted: dict[str, Any]) -> None:
        decryption = wanted.get("min_decryption_version", self.min_decryption_version) or 1
        encryption = wanted.get("min_encryption_version", self.min_encryption_version)
        if decryption > self.latest_version or encryption > self.latest_version:
            raise _Refused(400, f"cannot set min version beyond the latest key version {self.latest_version}")
        if encryption and encryption < decryption:
            raise _Refused(400, f"cannot set min encryption/decryption values; min encryption version {encryption} is less than {decryption}")
        if decryption < self.min_available_version:
            raise _Refused(400, "min decryption version should not be less than min available version")
        self.min_decryption_version, self.min_encryption_version = decryption, encryption
        self.deletion_allowed = wanted.get("deletion_allowed", self.deletion_allowed)
        self.exportable |= wanted.get("exportable", False)
        self.allow_plaintext_backup |= wanted.get("allow_plaintext_backup", False)

    def trim(self, first: int) -> None:
        if first < max(self.min_available_version, 1):
            raise _Refused(400, "minimum available version cannot be decremented")
        if not self.min_encryption_version:
            raise _Refused(400, "minimum available version cannot be set when minimum encryption version is not set")
        if first > min(self.min_encryption_version, self.min_decryption_version):
            raise _Refused(400, "minimum available version cannot be greater than minimum encryption or decryption version")
        self.min_available_version = first
        self.versions = {number: kept for number, kept in self.versions.items() if number >= first}

    def encrypt(self, body: dict[str, Any]) -> dict[str, Any]:
        number = body.get("key_version") or self.latest_version
        if number > self.latest_version or number < self.min_encryption_version or number not in self.versions:
            raise _Refused(400, "requested version for encryption is not available")
        nonce = secrets.token_bytes(NONCE_BYTES)
        sealed = AESGCM(self.versions[number][0]).encrypt(nonce, b64decode(body["plaintext"]), b64decode(body.get("associated_data") or ""))
        return {"ciphertext": f"vault:v{number}:{b64encode(nonce + sealed).decode()}", "key_version": number}

    def decrypt(self, body: dict[str, Any]) -> dict[str, Any]:
        prefix, _, text = body["ciphertext"].rpartition(":")
        if not (prefix.startswith("vault:v") and prefix[7:].isdigit()):
            raise _Refused(400, "invalid ciphertext: no prefix")
        number = int(prefix[7:])
        if number > self.latest_version:
            raise _Refused(400, "invalid ciphertext: version is too new")
        if number < self.min_decryption_version:
            raise _Refused(400, "ciphertext or signature version is disallowed by policy (too old)")
        try:
            raw = b64decode(text, validate=True)
            cipher = AESGCM(self.versions[number][0])
            plaintext = cipher.decrypt(raw[:NONCE_BYTES], raw[NONCE_BYTES:], b64decode(body.get("associated_data") or ""))
        except (ValueError, InvalidTag):
            raise _Refused(400, "cipher: message authentication failed") from None
        return {"plaintext": b64encode(plaintext).decode()}


class TransitServer:
    """Its state is its attributes: tests read and change them."""

    def __init__(self) -> None:
        self.address = ""
        self.root = secrets.token_hex(8)
        self.keys: dict[tuple[str, str], TransitKey] = {}
        """By namespace and path, such as `transit/keys/sidecar`."""
        self.sealed = False
        self.delay_seconds = 0.0
        self._tokens: dict[str, Grants] = {self.root: {"*": {"root"}}}

    def grant(self, grants: Grants) -> str:
        """A token that may do this and nothing else."""
        token = secrets.token_hex(8)
        self._tokens[token] = grants
        return token

    def revoke(self, token: str) -> None:
        del self._tokens[token]

    def capabilities(self, token: str, path: str) -> set[str]:
        """Of the most specific grant, as Vault does; `deny` where there is none."""
        grants = [(pattern, may) for pattern, may in self._tokens.get(token, {}).items() if _matches(pattern, path)]
        return max(grants, key=lambda grant: len(re.split(r"[+*]", grant[0])[0]))[1] if grants else {"deny"}

    async def handle(self, request: web.Request) -> web.Response:
        await asyncio.sleep(self.delay_seconds)
        if self.sealed:
            return _answer(503, {"errors": ["Vault is sealed"]})
        path = request.match_info["path"]
        body = await request.json() if request.can_read_body else {}
        try:
            data = self._serve(request.method, path, body, request.headers.get("X-Vault-Token", ""), request.headers.get("X-Vault-Namespace", ""))
        except _Refused as refused:
            return _answer(refused.status, {"errors": list(refused.errors)})
        return _answer(204, None) if data is None else _answer(200, {"data": data})

    def _serve(self, method: str, path: str, body: dict[str, Any], token: str, namespace: str) -> dict[str, Any] | None:
        if token not in self._tokens:
            raise _Refused(403, "permission denied")
        if path == "sys/capabilities-self":
            return {one: sorted(self.capabilities(token, one)) for one in body["paths"]}
        mount, kind, name, verb = _parts(path)
        at = (namespace.strip("/"), f"{mount}/keys/{name}")
        key = self.keys.get(at)
        wanted = {"GET": "read", "DELETE": "delete"}.get(method, "create" if kind == "encrypt" and key is None else "update")
        if not self.capabilities(token, path) & {"root", "sudo", wanted}:
            raise _Refused(403, "1 error occurred:\n\t* permission denied\n\n")
        if (kind, verb, method) == ("keys", "", "POST") or (kind == "encrypt" and key is None):
            flags = ("type", "exportable", "allow_plaintext_backup", "derived")
            key = key or self.keys.setdefault(at, TransitKey(name, **{flag: body[flag] for flag in flags if flag in body}))
            if not key.versions:
                key.rotate()
            if kind == "keys":
                return key.describe()
        if key is None:
            raise _Refused(404) if method == "GET" else _Refused(400, "encryption key not found")
        return self._on_key(method, kind, verb, at, key, body)

    def _on_key(self, method: str, kind: str, verb: str, at: tuple[str, str], key: TransitKey, body: dict[str, Any]) -> dict[str, Any] | None:
        if method == "DELETE":
            if not key.deletion_allowed:
                raise _Refused(400, f"error deleting policy {key.name}: deletion is not allowed for this policy")
            del self.keys[at]
            return None
        does: dict[tuple[str, str], Callable[[], Any]] = {
            ("keys", ""): key.describe,
            ("keys", "rotate"): key.rotate,
            ("keys", "config"): lambda: key.configure(body),
            ("keys", "trim"): lambda: key.trim(body["min_available_version"]),
            ("encrypt", ""): lambda: key.encrypt(body),
            ("decrypt", ""): lambda: key.decrypt(body),
            ("rewrap", ""): lambda: key.encrypt({"plaintext": key.decrypt(body)["plaintext"]}),
        }
        if (kind, verb) not in does:
            raise _Refused(404)
        found: dict[str, Any] | None = does[kind, verb]()
        return found


def _matches(pattern: str, path: str) -> bool:
    segments = "/".join("[^/]+" if segment == "+" else re.escape(segment) for segment in pattern.removesuffix("*").split("/"))
    return re.fullmatch(segments + (".*" if pattern.endswith("*") else ""), path) is not None


def _parts(path: str) -> tuple[str, str, str, str]:
    """`a/mount/keys/NAME/rotate` → mount, `keys`, name, `rotate`."""
    words = path.split("/")
    for kind in ("keys", "encrypt", "decrypt", "rewrap"):
        if kind in words[1:-1]:
            at = words.index(kind, 1)
            return "/".join(words[:at]), kind, words[at + 1], "/".join(words[at + 2 :])
    raise _Refused(404)


def _answer(status: int, body: dict[str, Any] | None) -> web.Response:
    return web.Response(status=status, body=json.dumps(body).encode() if body is not None else None, content_type="application/json")


@asynccontextmanager
async def transit_server(port: int = 0) -> AsyncIterator[TransitServer]:
    """Serves on 127.0.0.1 until the block ends."""
    server = TransitServer()
    app = web.Application()
    app.router.add_route("*", "/v1/{path:.+}", server.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        server.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield server
    finally:
        await runner.cleanup()


@contextmanager
def transit_server_thread() -> Iterator[TransitServer]:
    """The same for a test that is no coroutine: in a thread of its own."""
    up, ended = threading.Event(), asyncio.Event()
    served: list[tuple[TransitServer, asyncio.AbstractEventLoop]] = []

    async def serve() -> None:
        async with transit_server() as server:
            served.append((server, asyncio.get_running_loop()))
            up.set()
            await ended.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    up.wait(20)
    server, loop = served[0]
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
