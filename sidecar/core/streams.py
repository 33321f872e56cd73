"""Tenants and streams as a batch sees them: heads, sealing keys, and what it makes anew. Values; `sidecar.streams` fills them."""

from dataclasses import dataclass, field
from uuid import UUID

from sidecar.core.aead import Cipher, Suite
from sidecar.core.keys import DekRow, Kek, KekRow, TenantState
from sidecar.core.model import ScopeKind


@dataclass(slots=True, eq=False)
class SealingKey:
    """One key version under one suite, ready to seal: its envelope prefix and its cipher."""

    key_id: UUID
    version: int
    suite: Suite
    prefix: bytes
    cipher: Cipher = field(repr=False)


@dataclass(slots=True, eq=False)
class Stream:
    """A stream's head and key. `head` is the last position given out, staged ones included."""

    id: str
    id_lp: bytes
    stream_class: str
    refusal: str | None
    key: SealingKey | None
    head: int


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
    keks: dict[int, Kek] = field(default_factory=dict, repr=False)
    streams: dict[bytes, Stream] = field(default_factory=dict, repr=False)
    aged: dict[bytes, Stream] = field(default_factory=dict, repr=False)
    shared: dict[tuple[ScopeKind, str, Suite], SealingKey] = field(default_factory=dict, repr=False)

    @property
    def refusal(self) -> str | None:
        return None if self.state == TenantState.ACTIVE else "tenant_shredded"

    def forget(self) -> None:
        for kek in self.keks.values():
            kek.destroy()
        self.keks.clear()
        self.streams.clear()
        self.aged.clear()
        self.shared.clear()


@dataclass(slots=True)
class Fresh:
    """What a batch makes and its transaction must insert, in the order of the tables."""

    tenants: list[str] = field(default_factory=list)
    keks: list[KekRow] = field(default_factory=list)
    deks: list[DekRow] = field(default_factory=list)
    streams: list[tuple[str, Stream]] = field(default_factory=list)
    turned: list[tuple[str, Stream]] = field(default_factory=list)
    """Known streams that take another key version, or are encrypted from here on."""
    history: list[tuple[str, str, UUID, int, int]] = field(default_factory=list)
    """tenant, stream, key id, version, first position."""

    def touched(self) -> set[str]:
        """The tenants of which something is new."""
        named = [row.tenant for row in self.keks] + [row.name.scope.tenant for row in self.deks] + [row[0] for row in self.history]
        return {*self.tenants, *named, *(tenant for tenant, _ in (*self.streams, *self.turned))}


@dataclass(frozen=True, slots=True)
class Touch:
    """A stream's first record in a batch, where the stream is not in hand."""

    tenant: Tenant
    raw: bytes
    stream: str
    stream_class: str
