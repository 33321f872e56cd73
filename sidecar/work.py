"""One batch on its way: the records as they were understood, what is made of them, and what must be taken back if it fails."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sidecar.core.fields import Document
from sidecar.core.model import Headers
from sidecar.core.streams import Fresh, Stream, Subject, Tenant
from sidecar.core.view import guard_stripe
from sidecar.event_store import Ciphers
from sidecar.kafka.consumer import Batch, Partition
from sidecar.kafka.producer import Outgoing
from sidecar.postgres.batches import DeadLetter, LeaseMove, MessageRows, Refusal, StoreBatch
from sidecar.postgres.blind_index import Row
from sidecar.postgres.leases import Lease


class Redo(Exception):
    """Something that the batch was sealed with has changed: drop these tenants, seal again."""

    def __init__(self, tenants: Iterable[str], cause: str, policies: bool = False) -> None:
        super().__init__(cause)
        self.tenants, self.cause, self.policies = set(tenants), cause, policies


@dataclass(slots=True)
class Item:
    """A record on its way into the store."""

    lease: Lease
    offset: int
    tenant: bytes
    stream: bytes
    type_lp: bytes
    message_id: bytes
    value: bytes | None
    key: bytes | None
    timestamp_ms: int
    occurred_us: int
    headers: Headers
    projected: bool
    place: Stream | None = None
    """Its stream, once that is in hand; None where the tenant is refused."""
    subject: Subject | None = None
    """Its person, where the record is sealed under that person's key."""
    document: Document | None = None
    """Its value taken apart, where policy seals fields of it."""


@dataclass(slots=True)
class Faulty:
    """A record that becomes a dead letter. `tenant` and `stream` only where they are valid."""

    lease: Lease
    offset: int
    reason: str
    tenant: str | None
    stream: bytes | None
    value: bytes | None
    projected: bool


@dataclass(slots=True)
class Work:
    """One batch under way. Everything in it is void if `voids` is not the pipeline's any more."""

    batch: Batch
    voids: int
    items: list[Item] = field(default_factory=list)
    faulty: list[Faulty] = field(default_factory=list)
    ends: dict[Partition, tuple[Lease, int]] = field(default_factory=dict)
    moves: dict[Partition, LeaseMove] = field(default_factory=dict)
    replays: dict[Partition, list[int]] = field(default_factory=dict)
    """Partition → first offset and the one behind the last of what is stored but may not be projected."""
    tenants: dict[str, Tenant] = field(default_factory=dict)
    fresh: Fresh = field(default_factory=Fresh)
    rows: MessageRows = field(default_factory=MessageRows)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    outgoing: list[Outgoing] = field(default_factory=list)
    stored_rows: list[Any] = field(default_factory=list)
    ciphers: Ciphers | None = None
    heads: dict[tuple[str, str], int] = field(default_factory=dict)
    index: list[Row] = field(default_factory=list)
    """Of the blind index."""
    undo: dict[Stream, int] = field(default_factory=dict)
    """Heads as they were before this batch."""
    voided: bool = False
    flush: bool = False
    sealed: int = 0
    policy_version: int = 0

    @property
    def stripes(self) -> list[int]:
        return sorted({guard_stripe(name) for name in self.tenants})

    def store_batch(self) -> StoreBatch:
        """What its transaction writes."""
        heads = self.heads if self.flush else {}
        fresh = {(t, stream.id): self.heads.get((t, stream.id), 0) for t, stream in self.fresh.streams}
        flush = [(t, s, position) for (t, s), position in (heads | fresh).items()]
        moves, tenants = list(self.moves.values()), list(self.tenants)
        return StoreBatch(self.stripes, moves, tenants, self.fresh, self.rows, self.dead_letters, self.refusals, flush, self.index)
