"""Strategies and a small reader that the unit tests share."""

from dataclasses import dataclass, replace
from uuid import UUID

from hypothesis import strategies as st

from sidecar.core import envelope
from sidecar.core.aead import Cipher, Suite, lp
from sidecar.core.envelope import Header, event_aad, open_envelope, parse_header, stream_aad
from sidecar.core.errors import UnknownKey
from sidecar.core.keys import KeyName
from sidecar.core.model import Scope, ScopeKind
from sidecar.core.view import OWN_HEADERS

SUITES = list(Suite)
SCOPE_KINDS = list(ScopeKind)

DEK = bytes(range(32))
KEY_ID = UUID("0d9a7c52-6f6e-4a55-9a47-2c1f5b3e8a10")

tenants = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True)
identifiers = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Co", "Cn", "Zs", "Zl", "Zp"]) | st.just(" "), min_size=1, max_size=60)
u32s = st.integers(0, 2**32 - 1)
positions = st.integers(0, 2**64 - 1)
keys = st.binary(min_size=32, max_size=32)
nonces = st.binary(min_size=12, max_size=12)
suites = st.sampled_from(SUITES)
scope_kinds = st.sampled_from(SCOPE_KINDS)
header_names = st.text(max_size=20).filter(lambda name: name not in OWN_HEADERS)
kafka_headers = st.lists(st.tuples(header_names, st.none() | st.binary(max_size=40)), max_size=8)
scopes = st.builds(Scope, tenant=tenants, kind=scope_kinds, id=identifiers)
key_names = st.builds(KeyName, scope=scopes, key_id=st.uuids(), version=u32s, generation=u32s)
envelope_headers = st.builds(
    Header, suite=suites, scope_kind=scope_kinds, key_id=st.uuids(), key_version=u32s, framed=st.booleans(), field=st.booleans()
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the store says about an event beside its bytes: everything that an envelope is bound to."""

    tenant: str = "acme"
    stream: str = "jane@acme.com"
    position: int = 7
    message_id: str = "m-7"
    type: str = "UserRegistered"
    schema_version: int = 1
    field: str = ""

    def aad(self, prefix: bytes) -> bytes:
        """The product's associated data of this row."""
        return event_aad(
            stream_aad(self.tenant.encode(), self.stream.encode()),
            self.position,
            lp(self.message_id.encode()),
            lp(self.type.encode()),
            self.schema_version,
            lp(self.field.encode()),
            prefix,
        )


ROW = Row()

# The same bytes under another row: every way in which somebody with write access to the table could relabel them.
RELABELLED: dict[str, Row] = {
    "tenant": replace(ROW, tenant="globex"),
    "stream": replace(ROW, stream="john@acme.com"),
    "position": replace(ROW, position=8),
    "message_id": replace(ROW, message_id="m-8"),
    "type": replace(ROW, type="UserDeleted"),
    "schema_version": replace(ROW, schema_version=2),
    "field": replace(ROW, field="/email"),
    "a letter moved from message id to type": replace(ROW, message_id="m-", type="7UserRegistered"),
    "a letter moved from stream to tenant": replace(ROW, tenant="acmej", stream="ane@acme.com"),
}

Keyring = dict[tuple[UUID, int], bytes]


def header(suite: Suite = Suite.AES_256_GCM, kind: ScopeKind = ScopeKind.STREAM, *, version: int = 1, framed: bool = True) -> Header:
    return Header(suite=suite, scope_kind=kind, key_id=KEY_ID, key_version=version, framed=framed)


def seal(head: Header, row: Row, plaintext: bytes, dek: bytes = DEK) -> bytes:
    prefix = head.prefix()
    return envelope.seal(head.suite.cipher(dek), prefix, row.aad(prefix), plaintext)


def read(sealed: bytes, row: Row, keyring: Keyring) -> bytes:
    """A reader as the store's: the header names the key, the row gives the associated data."""
    head = parse_header(sealed)
    dek = keyring.get((head.key_id, head.key_version))
    if dek is None:
        raise UnknownKey
    cipher: Cipher = head.suite.cipher(dek)
    return open_envelope(cipher, sealed, row.aad(sealed[: envelope.PREFIX_BYTES]))
