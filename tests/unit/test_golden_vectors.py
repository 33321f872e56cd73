"""Bytes of past releases open for ever: with our code, and with a decoder that shares no code with it."""

import ast
import importlib.util
import json
import os
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import UUID

import pytest

from sidecar.core import audit, blind_index, keys, view
from sidecar.core.aead import Suite, lp
from sidecar.core.envelope import Header, data_aad, event_aad, from_text, open_envelope, parse_header, seal, stream_aad, to_text
from sidecar.core.errors import AuthenticationFailed
from sidecar.core.fields import digest_lp, open_document
from sidecar.core.model import Scope, ScopeKind
from sidecar.kms.file import FileKms
from tests.unit import independent_decoder as second

VECTORS = Path(__file__).parents[1] / "vectors"
Vector = dict[str, Any]


def load(name: str) -> Any:
    return json.loads((VECTORS / name).read_text())


def named(vectors: list[Vector]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("vector", vectors, ids=[v["name"].replace(" ", "-") for v in vectors])


ENVELOPES: list[Vector] = load("envelopes-v1.json")
WRAPS: dict[str, list[Vector]] = load("wraps-v1.json")
AUDIT: Vector = load("audit-v1.json")
DOCUMENTS: Vector = load("documents-v1.json")


def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_vectors", VECTORS / "make.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def our_aad(vector: Vector) -> bytes:
    prefix = bytes.fromhex(vector["envelope"])[:25]
    if vector["domain"] == "ks/data/v1":
        return data_aad(vector["tenant"], vector["stream"], prefix)
    return event_aad(
        stream_aad(vector["tenant"].encode(), vector["stream"].encode()),
        vector["position"],
        lp(vector["message_id"].encode()),
        lp(vector["type"].encode()),
        vector["schema_version"],
        lp(vector["field_path"].encode()),
        prefix,
    )


def test_there_is_an_envelope_per_suite_scope_and_form() -> None:
    forms = {(v["suite"], v["scope_kind"], v["field"]) for v in ENVELOPES if v["domain"] == "ks/event/v1"}
    assert forms == {(suite, kind, field) for suite in (1, 2, 3) for kind in ScopeKind for field in (False, True)}
    assert {v["suite"] for v in ENVELOPES if v["domain"] == "ks/data/v1"} == {1, 2, 3}
    assert {v["key_version"] for v in ENVELOPES} >= {1, 2, 2**32 - 1}


@named(ENVELOPES)
def test_golden_envelope_opens_with_our_code(vector: Vector) -> None:
    envelope = bytes.fromhex(vector["envelope"])
    head = parse_header(envelope)
    assert head == Header(
        suite=Suite(vector["suite"]),
        scope_kind=ScopeKind(vector["scope_kind"]),
        key_id=UUID(vector["key_id"]),
        key_version=vector["key_version"],
        framed=vector["framed"],
        field=vector["field"],
    )
    aad = our_aad(vector)
    assert aad.hex() == vector["aad"]
    plaintext = open_envelope(head.suite.cipher(bytes.fromhex(vector["dek"])), envelope, aad)
    assert plaintext.hex() == vector["plaintext"]
    assert to_text(envelope) == vector["text"]
    assert from_text(vector["text"]) == envelope
    if vector["framed"]:
        attributes, value = view.unframe(plaintext)
        assert (attributes.decode(), value.hex()) == (vector["attributes"], vector["value"])
        assert view.attributes(*view.parse_attributes(attributes)[:5]) == attributes


@named(ENVELOPES)
def test_golden_envelope_is_what_we_seal_today(vector: Vector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", lambda size: bytes.fromhex(vector["nonce"])[:size])
    envelope = bytes.fromhex(vector["envelope"])
    cipher = Suite(vector["suite"]).cipher(bytes.fromhex(vector["dek"]))
    assert seal(cipher, parse_header(envelope).prefix(), our_aad(vector), bytes.fromhex(vector["plaintext"])) == envelope


@named(ENVELOPES)
def test_golden_envelope_opens_with_the_second_decoder(vector: Vector) -> None:
    envelope = second.from_text(vector["text"])
    assert envelope.hex() == vector["envelope"]
    head = second.read_header(envelope)
    assert head == {name: vector[name] for name in head}
    aad = second.event_aad(vector, envelope) if vector["domain"] == "ks/event/v1" else second.data_aad(vector, envelope)
    assert aad.hex() == vector["aad"]
    plaintext = second.open_envelope(envelope, bytes.fromhex(vector["dek"]), aad)
    assert plaintext.hex() == vector["plaintext"]
    if vector["framed"]:
        attributes, value = second.unframe(plaintext)
        assert (attributes, value.hex()) == (json.loads(vector["attributes"]), vector["value"])
    with pytest.raises(second.Rejected):
        second.open_envelope(envelope, bytes.fromhex(vector["dek"]), aad + b"\0")


@named(WRAPS["deks"])
def test_golden_dek_wrap_opens_with_both(vector: Vector) -> None:
    wrapped, committed, kek_bytes = (bytes.fromhex(vector[name]) for name in ("wrapped", "commitment", "kek"))
    kek = keys.Kek(vector["tenant"], vector["generation"], 1, bytearray(kek_bytes))
    scope = Scope(tenant=vector["tenant"], kind=ScopeKind(vector["scope_kind"]), id=vector["scope_id"])
    name = keys.KeyName(scope=scope, key_id=UUID(vector["key_id"]), version=vector["version"], generation=vector["generation"])
    dek = kek.unwrap(wrapped, name, committed)
    assert dek._secret.hex() == vector["dek"]
    assert kek.wrap(bytes.fromhex(vector["dek"]), name, bytes.fromhex(vector["nonce"])) == (wrapped, committed)
    assert keys.fingerprint(committed).hex() == vector["fingerprint"] == second.fingerprint(committed).hex()
    assert second.unwrap_dek(kek_bytes, wrapped, vector).hex() == vector["dek"]
    assert second.dek_commitment(bytes.fromhex(vector["dek"]), name.key_id.bytes, vector["version"]) == committed


@named(WRAPS["keks"])
def test_golden_kek_payload_opens_with_both(vector: Vector) -> None:
    whose = (vector["tenant"], vector["generation"], vector["version"])
    payload, kek_bytes = bytes.fromhex(vector["payload"]), bytes.fromhex(vector["kek"])
    kek = keys.Kek.from_payload(payload, *whose)
    assert kek.payload() == payload == kek_bytes + second.kek_context(*whose)
    assert kek.commitment().hex() == vector["commitment"] == second.kek_commitment(kek_bytes, *whose).hex()
    assert keys.fingerprint(kek.commitment()).hex() == vector["fingerprint"]


@named(WRAPS["file_kms"])
async def test_golden_wrap_of_the_file_kms_opens_with_both(vector: Vector, tmp_path: Path) -> None:
    path = tmp_path / "kek"
    path.touch(mode=0o600)
    path.write_bytes(bytes.fromhex(vector["key_file"]))
    wrapped, aad = bytes.fromhex(vector["wrapped"]), bytes.fromhex(vector["aad"])
    plaintext = await FileKms(str(path)).unwrap(wrapped, aad, vector["key_version"])
    assert plaintext.hex() == vector["plaintext"]
    assert second.unwrap_by_file(path.read_bytes(), wrapped, aad) == (plaintext, vector["key_version"])


def test_golden_audit_chain_holds_with_both() -> None:
    from datetime import datetime

    rows, prev = [], audit.GENESIS
    for vector in AUDIT["rows"]:
        assert second.audit_hash(vector, prev).hex() == vector["hash"]
        prev = bytes.fromhex(vector["hash"])
        hashes = {name: bytes.fromhex(vector[name]) for name in ("prev_hash", "hash")}
        reference = bytes.fromhex(vector["tenant_ref"]) if vector["tenant_ref"] else None
        rows.append(audit.AuditRow(**(vector | hashes | {"tenant_ref": reference, "at": datetime.fromisoformat(vector["at"])})))
    assert len(rows) == 3
    assert audit.find_break(rows) is None
    assert AUDIT["tenant_refs"] == {tenant: second.tenant_ref(tenant).hex() for tenant in ("acme", "globex")}
    assert AUDIT["tenant_refs"] == {tenant: audit.tenant_ref(tenant).hex() for tenant in ("acme", "globex")}


def test_control_a_golden_file_with_one_changed_bit_is_noticed_by_both() -> None:
    vector = ENVELOPES[0]
    changed = bytearray.fromhex(vector["envelope"])
    changed[-1] ^= 1
    with pytest.raises(AuthenticationFailed):
        open_envelope(Suite(vector["suite"]).cipher(bytes.fromhex(vector["dek"])), bytes(changed), our_aad(vector))
    with pytest.raises(second.Rejected):
        second.open_envelope(bytes(changed), bytes.fromhex(vector["dek"]), our_aad(vector))


def test_maker_makes_the_standing_files_to_the_byte_and_never_writes_over_one(tmp_path: Path) -> None:
    maker = make()
    assert maker.write(tmp_path) == []
    for name in maker.FILES:
        assert (tmp_path / name).read_bytes() == (VECTORS / name).read_bytes()
    (tmp_path / "wraps-v1.json").write_text("older")
    assert maker.write(tmp_path) == list(maker.FILES)
    assert (tmp_path / "wraps-v1.json").read_text() == "older"


def test_second_decoder_shares_no_code_with_the_product() -> None:
    tree = ast.parse(Path(second.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name.startswith(("sidecar", "tests"))]
    assert not [name for name in imported if "aead" in name or "hkdf" in name]


@named(DOCUMENTS["documents"])
def test_golden_document_opens_with_our_code_and_with_a_second_decoder(vector: Vector) -> None:
    stored, envelope, dek = (bytes.fromhex(vector[name]) for name in ("stored", "envelope", "dek"))
    at = (vector["position"], lp(vector["message_id"].encode()), lp(vector["type"].encode()), 1)
    bind = partial(event_aad, stream_aad(vector["tenant"].encode(), vector["stream"].encode()), *at)
    head, prefix = parse_header(envelope), envelope[:25]
    cipher = head.suite.cipher(dek)
    attributes, listed = view.unframe(open_envelope(cipher, envelope, bind(digest_lp(stored), prefix)))
    assert attributes.decode() == vector["attributes"]
    read = open_document(stored, listed, prefix, bind, partial(open_envelope, cipher))
    assert read.text.encode() == bytes.fromhex(vector["value"])
    assert (head.suite, head.key_version, head.framed, head.field) == (vector["suite"], vector["key_version"], True, False)
    again = second.open_document(stored, envelope, dek, vector)
    assert again == (json.loads(vector["attributes"]), bytes.fromhex(vector["value"]))
    for changed in (stored + b" ", stored.replace(b"plan", b"Plan"), b"{}", bytes.fromhex(vector["value"])):
        if changed != stored:
            with pytest.raises(second.Rejected):
                second.open_document(changed, envelope, dek, vector)
            with pytest.raises(AuthenticationFailed):
                open_envelope(cipher, envelope, bind(digest_lp(changed), prefix))


@named(DOCUMENTS["index"]["tokens"])
def test_golden_token_is_ours_and_a_second_decoders(vector: Vector) -> None:
    dek, value = bytes.fromhex(DOCUMENTS["index"]["dek"]), blind_index.canonical(vector["json"])
    assert value == bytes.fromhex(vector["canonical"])
    name = keys.KeyName(scope=blind_index.scope_of_index("acme"), key_id=UUID(int=0), version=1, generation=1)
    assert keys.Dek(name, bytearray(dek)).into_index_key().token(vector["pointer"], value).hex() == vector["token"]
    assert second.blind_index_token(dek, vector["pointer"], value).hex() == vector["token"]
