"""Writes the golden vectors, once: an existing file is never touched, a new format gets a new file.

    python tests/vectors/make.py

Keys and nonces are fixed. Sealing draws nonces from os.urandom and takes none from a caller, so os.urandom is replaced,
here and nowhere else.
"""

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import UUID

from sidecar.core import audit, blind_index, fields, keys, view
from sidecar.core.aead import Suite, lp
from sidecar.core.envelope import Header, data_aad, event_aad, seal, stream_aad, to_text
from sidecar.core.model import Scope, ScopeKind
from sidecar.kms.file import FileKms

HERE = Path(__file__).parent


def fixed(label: str, size: int = 32) -> bytes:
    return sha256(f"sidecar test vector: {label}".encode()).digest()[:size]


@contextmanager
def nonce_of(label: str) -> Iterator[bytes]:
    nonce = fixed(f"nonce {label}", 12)
    with patch.object(os, "urandom", lambda size: nonce if size == 12 else sys.exit("drew something else than one nonce")):
        yield nonce


def _header(name: str, suite: Suite, kind: ScopeKind, version: int, *, framed: bool, field: bool) -> Header:
    return Header(suite=suite, scope_kind=kind, key_id=UUID(bytes=fixed(f"key id {name}", 16)), key_version=version, framed=framed, field=field)


def _common(name: str, head: Header, nonce: bytes, aad: bytes, plaintext: bytes, sealed: bytes) -> dict[str, Any]:
    return {
        "name": name,
        "format_version": 1,
        "suite": head.suite.value,
        "algorithm": head.suite.label,
        "scope_kind": head.scope_kind.value,
        "framed": head.framed,
        "field": head.field,
        "key_id": head.key_id.hex,
        "key_version": head.key_version,
        "nonce": nonce.hex(),
        "aad": aad.hex(),
        "plaintext": plaintext.hex(),
        "envelope": sealed.hex(),
        "text": to_text(sealed),
    }


def _event(suite: Suite, kind: ScopeKind, number: int, *, field: bool) -> dict[str, Any]:
    name = f"{suite.label} {kind.value} {'field' if field else 'framed'}"
    version = (1, 2, 2**32 - 1)[number % 3]
    head = _header(name, suite, kind, version, framed=not field, field=field)
    dek = fixed(f"dek {name}")
    row: dict[str, Any] = {
        "tenant": "acme",
        "stream": ("jane@acme.com", "a b", "x::y", "überweisung-7")[number % 4],
        "position": (1, 4711, 2**40)[number % 3],
        "message_id": f"m-{number}",
        "type": "UserRegistered",
        "schema_version": 1 + number % 2,
        "field_path": "/address/street" if field else "",
    }
    value = b'{"name":"Jane Doe","email":"jane@acme.com"}'
    parts: dict[str, Any] = {}
    if field:
        plaintext = b'"12 Elm Street"'
    else:
        tombstone = number % 5 == 4
        attributes = view.attributes(
            b"jane" if number % 2 else b"\xff\x00key", 1_795_435_200_123, [("trace", b"abc"), ("raw", b"\xfe"), ("none", None)], tombstone
        )
        plaintext = view.frame(attributes, None if tombstone else value)
        parts = {"attributes": attributes.decode(), "value": "" if tombstone else value.hex()}
    prefix = head.prefix()
    aad = event_aad(
        stream_aad(row["tenant"].encode(), row["stream"].encode()),
        row["position"],
        lp(row["message_id"].encode()),
        lp(row["type"].encode()),
        row["schema_version"],
        lp(row["field_path"].encode()),
        prefix,
    )
    with nonce_of(name) as nonce:
        sealed = seal(suite.cipher(dek), prefix, aad, plaintext)
    return {**_common(name, head, nonce, aad, plaintext, sealed), "domain": "ks/event/v1", "dek": dek.hex(), **row, **parts}


def _data(suite: Suite) -> dict[str, Any]:
    name = f"{suite.label} text outside the store"
    head = _header(name, suite, ScopeKind.STREAM, 3, framed=False, field=False)
    dek, plaintext, prefix = fixed(f"dek {name}"), b"12 Elm Street", head.prefix()
    aad = data_aad("acme", "jane@acme.com", prefix)
    with nonce_of(name) as nonce:
        sealed = seal(suite.cipher(dek), prefix, aad, plaintext)
    where = {"domain": "ks/data/v1", "dek": dek.hex(), "tenant": "acme", "stream": "jane@acme.com"}
    return {**_common(name, head, nonce, aad, plaintext, sealed), **where}


def envelopes() -> list[dict[str, Any]]:
    """One per suite, scope kind and form; the data domain once per suite."""
    forms = [(suite, kind, field) for suite in Suite for kind in ScopeKind for field in (False, True)]
    events = [_event(suite, kind, number, field=field) for number, (suite, kind, field) in enumerate(forms)]
    return events + [_data(suite) for suite in Suite]


def documents() -> dict[str, Any]:
    """One document per suite of which fields are sealed; tokens of a blind index."""
    values = [
        b' {"email" : "jane@acme.com", "n": 1.50, "items":[{"to":"Jane","q":1},{"q":2}], "note":"ks1.not ours", "x":{"\\u0061/b":null}} ',
        '{"email":{"first":"\u00fcber","all":[1,true]},"items":[],"plan":"\u2028"}'.encode(),
        b'{"plan":"free"}',
    ]
    pointers, made = ("/email", "/items/*/to", "/x/a~1b"), []
    for number, (suite, value) in enumerate(zip(Suite, values, strict=True)):
        name = f"{suite.label} document"
        head = _header(name, suite, list(ScopeKind)[number], 1 + number, framed=True, field=False)
        row: dict[str, Any] = {"tenant": "acme", "stream": "jane@acme.com", "position": 7 + number, "message_id": f"m-{number}", "type": "T"}
        attributes = view.attributes(b"jane", 1_795_435_200_123, [("trace", b"abc")], False)
        of_stream = stream_aad(row["tenant"].encode(), row["stream"].encode())
        bind = partial(event_aad, of_stream, row["position"], lp(row["message_id"].encode()), lp(row["type"].encode()), 1)
        dek, drawn = fixed(f"dek {name}"), count()
        with patch.object(os, "urandom", lambda size, name=name, drawn=drawn: fixed(f"nonce {name} {next(drawn)}", size)):
            stored, sealed = fields.seal_document(
                fields.Fields(pointers).find(value), attributes, head.prefix(), bind, partial(seal, suite.cipher(dek))
            )  # fmt: skip
        row |= {"schema_version": 1, "field_path": ""}
        parts = {"value": value.hex(), "stored": stored.hex(), "envelope": sealed.hex(), "attributes": attributes.decode()}
        made.append({"name": name, "suite": suite.value, "pointers": pointers, "dek": dek.hex(), "key_version": 1 + number, **row, **parts})
    of_index = fixed("dek of the blind index")
    name_of = keys.KeyName(
        scope=blind_index.scope_of_index("acme"), key_id=UUID(bytes=fixed("key id of the blind index", 16)), version=1, generation=1
    )
    key = keys.Dek(name_of, bytearray(of_index)).into_index_key()
    texts = ('"jane@acme.com"', '"\\u00fcber"', '""', "1", "-12.50", "0.0", "1e3", "true", "false")
    found = [(text, blind_index.searched(text)) for text in texts]
    listed = [
        {"name": f"token of {text}", "pointer": "/email", "json": text, "canonical": v.hex(), "token": key.token("/email", v).hex()}
        for text, v in found
    ]
    return {"documents": made, "index": {"dek": of_index.hex(), "tokens": listed}}


def wraps() -> dict[str, Any]:
    """DEK wraps, KEK payloads and the file KMS."""
    deks, keks, by_file = [], [], []
    for number, kind in enumerate(ScopeKind):
        kek = keys.Kek("acme", 1 + number, 1, bytearray(fixed(f"kek {kind}")))
        scope_id = "acme" if kind is ScopeKind.TENANT else ("jane@acme.com", "UserPersonalData")[number % 2]
        scope, key_id = Scope(tenant="acme", kind=kind, id=scope_id), UUID(bytes=fixed(f"key id {kind}", 16))
        name = keys.KeyName(scope=scope, key_id=key_id, version=(1, 2, 2**32 - 1)[number % 3], generation=1 + number)
        dek, nonce = fixed(f"wrapped dek {kind}"), fixed(f"wrap nonce {kind}", 12)
        wrapped, committed = kek.wrap(dek, name, nonce)
        deks.append(
            {
                "name": f"DEK of scope {kind.value}",
                "kek": fixed(f"kek {kind}").hex(),
                "dek": dek.hex(),
                "tenant": "acme",
                "scope_kind": kind.value,
                "scope_id": scope.id,
                "key_id": name.key_id.hex,
                "version": name.version,
                "generation": name.generation,
                "nonce": nonce.hex(),
                "wrapped": wrapped.hex(),
                "commitment": committed.hex(),
                "fingerprint": keys.fingerprint(committed).hex(),
            }
        )
    for tenant, generation, version in (("acme", 1, 1), ("acme", 2, 3), ("globex", 1, 2**32 - 1)):
        kek = keys.Kek(tenant, generation, version, bytearray(fixed(f"kek {tenant} {generation} {version}")))
        keks.append(
            {
                "name": f"KEK of {tenant}, generation {generation}, version {version}",
                "kek": kek.payload()[:32].hex(),
                "tenant": tenant,
                "generation": generation,
                "version": version,
                "payload": kek.payload().hex(),
                "commitment": kek.commitment().hex(),
                "fingerprint": keys.fingerprint(kek.commitment()).hex(),
            }
        )
        by_file.append(_file_wrap(kek))
    return {"deks": deks, "keks": keks, "file_kms": by_file}


def _file_wrap(kek: keys.Kek) -> dict[str, Any]:
    content = b"sidecar-kek-v1\n" + fixed("key file")
    aad = keys.kek_context(kek.tenant, kek.generation, kek.version)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kek")
        path.touch(mode=0o600)
        path.write_bytes(content)
        with nonce_of(f"file kms {kek.tenant} {kek.generation} {kek.version}"):
            wrapped, version = asyncio.run(FileKms(str(path)).wrap(kek.payload(), aad))
    return {
        "name": f"KEK of {kek.tenant}, generation {kek.generation}, under a key file",
        "key_file": content.hex(),
        "plaintext": kek.payload().hex(),
        "aad": aad.hex(),
        "wrapped": wrapped.hex(),
        "key_version": version,
    }


def audit_chain() -> dict[str, Any]:
    """Three rows of one writer, with what canonical JSON can get wrong."""
    acts: list[tuple[str, str, str | None, dict[str, Any]]] = [
        ("keys_created", "data-0", "acme", {"keys": ["b", "a"], "count": 2, "class": "UserPersonalData"}),
        ("rotate", "dpo@example.org", "acme", {"scope": {"kind": "stream", "id": "jane@acme.com"}, "reason": "Prüfung „jährlich“ \u2028"}),
        ("start", "control-0", None, {"nested": {"z": [1, None, True], "a": {}}, "big": 2**53}),
    ]
    rows, prev = [], audit.GENESIS
    for seq, (action, actor, tenant, details) in enumerate(acts, start=1):
        at = datetime(2026, 11, 23, 12, 0, seq, 120_000 * (seq - 1), tzinfo=UTC)
        reference = audit.tenant_ref(tenant) if tenant else None
        row = audit.link(prev, writer="control-0", seq=seq, at=at, action=action, actor=actor, tenant_ref=reference, details=details)
        rows.append(
            {
                "writer": row.writer,
                "seq": seq,
                "at": at.isoformat(timespec="microseconds"),
                "action": action,
                "actor": actor,
                "tenant_ref": reference.hex() if reference else None,
                "details": details,
                "prev_hash": prev.hex(),
                "hash": row.hash.hex(),
            }
        )
        prev = row.hash
    return {"genesis": audit.GENESIS.hex(), "tenant_refs": {t: audit.tenant_ref(t).hex() for t in ("acme", "globex")}, "rows": rows}


FILES: dict[str, Callable[[], Any]] = {
    "envelopes-v1.json": envelopes,
    "wraps-v1.json": wraps,
    "audit-v1.json": audit_chain,
    "documents-v1.json": documents,
}


def write(folder: Path) -> list[str]:
    """Writes what is missing; -> the names that stood already and were left alone."""
    kept = []
    for name, make in FILES.items():
        try:
            with (folder / name).open("x", encoding="utf-8") as file:
                json.dump(make(), file, indent=1, ensure_ascii=False)
                file.write("\n")
        except FileExistsError:
            kept.append(name)
    return kept


if __name__ == "__main__":
    standing = write(HERE)
    if standing:
        sys.exit(f"left alone, golden files are never rewritten: {', '.join(standing)}")
