"""Tenants and streams as a batch sees them: heads, sealing keys, and what it makes anew. Values; `sidecar.streams` fills them."""

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sidecar.core.aead import Cipher, Secret, Suite
from sidecar.core.blind_index import IndexKey
from sidecar.core.fields import Fields
from sidecar.core.keys import DekRow, Kek, KekRow, TenantState
from sidecar.core.model import Scope, ScopeKind
from sidecar.core.policy import Encrypt

KeyRef = tuple[str, UUID, int]
"""tenant, key id, version."""


@dataclass(slots=True, eq=False)
class SealingKey(Secret):
    """One key version under one suite, ready to seal: its envelope prefix and its cipher."""

    scope: Scope
    key_id: UUID
    version: int
    suite: Suite
    prefix: bytes
    cipher: Cipher = field(repr=False)
    uses: int = 0
    """How often it sealed or may seal, of all instances, as far as is known here."""
    left: int = 0
    """How much of `uses` is set aside for this instance and not used yet."""
    fields_left: int = 0
    """Of a stream's key, which is counted by positions: how many seals of fields are on record beside them and not used yet."""

    @property
    def ref(self) -> KeyRef:
        return self.scope.tenant, self.key_id, self.version


Barriers = dict[tuple[int, int], int]
"""(source id, partition) → where the log ended when a scope was shredded. What stands below is refused for ever, also after a readmission."""


@dataclass(slots=True, eq=False)
class Stream:
    """A stream's head and key. `head` is the last position given out, staged ones included."""

    id: str
    id_lp: bytes
    stream_class: str
    refusal: str | None
    key: SealingKey | None
    head: int
    by_subject: Encrypt | None = None
    """Set where each record is sealed under its person's key: then there is no key of the stream."""
    fields: Fields | None = None
    """Set where policy seals fields of a document, and not the whole event."""
    noted: SealingKey | None = None
    """The key whose use is on record, up to now and from here on."""
    turns: bool = False
    """The next use that is noted changes the stream's row: it is there, and says otherwise."""
    source: Any = None
    """The lease of the partition that its last record came from."""
    held: Any = None
    """Of a library's: what an append needs of it, as of the policies that are named there."""


@dataclass(slots=True, eq=False)
class Subject:
    """A person of a tenant, and the key of that person's events under one suite; `refusal` where the person was erased."""

    id: str
    refusal: str | None
    key: SealingKey | None
    noted: set[Stream] = field(default_factory=set, repr=False)
    """Streams on whose record the key's use stands."""


@dataclass(slots=True, eq=False)
class Tenant:
    """A tenant as of one epoch."""

    id: str
    id_lp: bytes
    aad: bytes
    exists: bool
    state: str
    generation: int
    epoch: int
    erased_classes: frozenset[str]
    barriers: dict[tuple[str, str], Barriers] = field(default_factory=dict)
    """By scope kind and id; of a tenant that was never readmitted, nor a scope in it, there are none."""
    foretold_classes: frozenset[bytes] = frozenset()
    """Pseudonyms of classes that the ledger has entries of, and this database no name."""
    keks: dict[int, Kek] = field(default_factory=dict, repr=False)
    streams: dict[bytes, Stream] = field(default_factory=dict, repr=False)
    aged: dict[bytes, Stream] = field(default_factory=dict, repr=False)
    shared: dict[tuple[ScopeKind, str, Suite], SealingKey] = field(default_factory=dict, repr=False)
    subjects: dict[tuple[str, Suite], Subject] = field(default_factory=dict, repr=False)
    aged_subjects: dict[tuple[str, Suite], Subject] = field(default_factory=dict, repr=False)
    index_key: IndexKey | None = field(default=None, repr=False)

    @property
    def refusal(self) -> str | None:
        return None if self.state == TenantState.ACTIVE else "tenant_shredded"

    def refusal_of(self, source_id: int, partition: int, offset: int, stream: Stream | None, subject: Subject | None = None) -> str | None:
        """Why a record is refused, or None; without `stream` as far as the tenant alone decides."""
        if self.refusal is not None:
            return self.refusal
        if self.is_late(ScopeKind.TENANT, self.id, source_id, partition, offset):
            return "tenant_shredded"
        if stream is None or stream.refusal is not None:
            return None if stream is None else stream.refusal
        if subject is not None and subject.refusal is not None:
            return subject.refusal
        scopes = [(ScopeKind.CLASS, stream.stream_class), (ScopeKind.STREAM, stream.id)]
        if subject is not None:
            scopes.append((ScopeKind.SUBJECT, subject.id))
        return "scope_erased" if any(self.is_late(kind, id, source_id, partition, offset) for kind, id in scopes) else None

    def is_late(self, kind: ScopeKind, id: str, source_id: int, partition: int, offset: int) -> bool:
        """Did the record stand in its topic when this scope was shredded?"""
        barriers = self.barriers.get((kind, id))
        return barriers is not None and offset < barriers.get((source_id, partition), 0)

    def forget(self) -> None:
        for kek in self.keks.values():
            kek.destroy()
        self.keks.clear()
        if self.index_key is not None:
            self.index_key.destroy()
            self.index_key = None
        self.streams.clear()
        self.aged.clear()
        self.shared.clear()
        self.subjects.clear()
        self.aged_subjects.clear()


@dataclass(slots=True)
class Fresh:
    """What a batch makes and its transaction must insert, in the order of the tables."""

    tenants: list[str] = field(default_factory=list)
    keks: list[KekRow] = field(default_factory=list)
    deks: list[DekRow] = field(default_factory=list)
    streams: list[tuple[str, Stream]] = field(default_factory=list)
    turned: list[tuple[str, str, UUID | None, str, int]] = field(default_factory=list)
    """tenant, stream, key id, algorithm, position: known streams that take another key version, or are encrypted from here on. Without a
    key id, each of their records is sealed under a person's."""
    history: list[tuple[str, str, UUID, int, int]] = field(default_factory=list)
    """tenant, stream, key id, version, first position."""
    persons: list[tuple[str, str, UUID, int, int]] = field(default_factory=list)
    """Likewise, of persons' keys: many of them are in use in a stream at a time."""
    retired: list[KeyRef] = field(default_factory=list)
    """Key versions that have reached the soft limit; their successors are among `deks`."""
    reserved: dict[KeyRef, int] = field(default_factory=dict)
    """Uses of shared keys that this instance sets aside."""

    def touched(self) -> set[str]:
        """The tenants of which something is new."""
        named = [row.tenant for row in self.keks] + [row.name.scope.tenant for row in self.deks] + [tenant for tenant, _ in self.streams]
        named += [row[0] for row in (*self.history, *self.persons)] + [ref[0] for ref in (*self.retired, *self.reserved)]
        return {*self.tenants, *named}


@dataclass(frozen=True, slots=True)
class Touch:
    """A stream's first record in a batch, where the stream is not in hand."""

    tenant: Tenant
    raw: bytes
    stream: str
    stream_class: str
