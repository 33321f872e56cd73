"""The audit chain: each row's hash covers the one before, so a changed, removed or reordered row shows.

    hash = SHA-256(LP("ks/audit/v1", prev_hash, writer, u64 seq, at, action, actor, tenant_ref, details))

`at` is ISO 8601 in UTC with microseconds, `details` canonical JSON (sorted names, no white space). A removal of the
newest rows does not show in the chain alone: it shows against a signed checkpoint (core/checkpoint.py).
"""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final

import orjson

from sidecar.core.aead import lp, u32
from sidecar.core.model import Scope

GENESIS = bytes(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRow:
    """One act: who did what to whose keys; never a payload, never a key."""

    writer: str
    seq: int
    at: datetime
    action: str
    actor: str
    tenant_ref: bytes | None
    details: dict[str, Any]
    prev_hash: bytes
    hash: bytes


def tenant_ref(tenant: str) -> bytes:
    """A tenant's pseudonym in the trail: 16 bytes, the same in every deployment."""
    return sha256(lp(b"ks/tenant-ref/v1", tenant.encode())).digest()[:16]


def scope_ref(scope: Scope) -> bytes:
    """A scope's pseudonym in trail and ledger: 16 bytes; a scope's id may be a person's name."""
    return sha256(lp(b"ks/scope-ref/v1", scope.tenant.encode(), scope.kind.encode(), scope.id.encode())).digest()[:16]


def canonical(document: Any) -> bytes:
    """JSON with sorted names and no white space, non-ASCII as it is: one document, one row of bytes. No floats: writers disagree on them."""
    try:
        return orjson.dumps(document, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # a number of more than 64 bits
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@lru_cache(1024)
def _lp(part: str | bytes | None) -> bytes:
    """Of what many rows have in common."""
    return lp(part.encode() if isinstance(part, str) else part or b"")


_HEAD: Final = lp(b"ks/audit/v1") + u32(len(GENESIS))
_SEQ = struct.Struct(">IQ")


def _hash(prev: bytes, writer: str, seq: int, at: datetime, action: str, actor: str, tenant_ref: bytes | None, details: dict[str, Any]) -> bytes:
    """The chain's formula, written out: a trail of a million rows is verified with it."""
    moment = at.astimezone(UTC).isoformat(timespec="microseconds").encode()
    body = canonical(details)
    parts = (_HEAD, prev, _lp(writer), _SEQ.pack(8, seq), u32(len(moment)), moment, _lp(action), _lp(actor), _lp(tenant_ref), u32(len(body)), body)
    return sha256(b"".join(parts)).digest()


def link(prev: bytes, *, writer: str, seq: int, at: datetime, action: str, actor: str, tenant_ref: bytes | None, details: dict[str, Any]) -> AuditRow:
    """The next row of a chain whose newest hash is `prev` (GENESIS for the first)."""
    digest = _hash(prev, writer, seq, at, action, actor, tenant_ref, details)
    return AuditRow(writer=writer, seq=seq, at=at, action=action, actor=actor, tenant_ref=tenant_ref, details=details, prev_hash=prev, hash=digest)


_NOTHING: Final[Mapping[int, bytes]] = {}


class Chain:
    """Checks one writer's rows as they come, in order of seq, and what checkpoints signed of it: `signed` is seq → hash.

    `seq` is the newest row's, `problem` the first thing that is wrong. Rows up to `covered_seq` are what a checkpoint signed; the first
    one behind, if any, was written at `uncovered_since`: from there on a removal of the newest rows would not show.
    """

    def __init__(self, writer: str, signed: Mapping[int, bytes] = _NOTHING) -> None:
        self.writer, self._signed = writer, signed
        self._newest_signed = max(signed, default=0)
        self._prev, self._rows, self.seq = GENESIS, 0, 0
        self.problem: str | None = None
        self.covered_seq: int | None = None
        self.covered_at: datetime | None = None
        self.uncovered_since: datetime | None = None

    def add(
        self, seq: int, at: datetime, action: str, actor: str, tenant_ref: bytes | None, details: dict[str, Any], prev_hash: bytes, hash: bytes
    ) -> None:
        self._rows += 1
        self.seq = seq
        if self.uncovered_since is None and seq > self._newest_signed:
            self.uncovered_since = at
        if self.problem is not None:
            return
        if seq != self._rows:
            self.problem = f"writer {self.writer}: row {self._rows} is missing"
        elif prev_hash != self._prev or hash != _hash(prev_hash, self.writer, seq, at, action, actor, tenant_ref, details):
            self.problem = f"writer {self.writer}: row {seq} was changed"
        elif self._signed and seq in self._signed:
            if self._signed[seq] != hash:
                self.problem = f"writer {self.writer}: row {seq} is not the one that a checkpoint signed"
            self.covered_seq, self.covered_at = seq, at
        self._prev = hash

    def end(self) -> None:
        """No more rows come: whatever was signed must have been among them."""
        if self.problem is None and self.seq < self._newest_signed:
            missing = f"row {self._newest_signed}" if self.seq + 1 == self._newest_signed else f"rows {self.seq + 1} to {self._newest_signed}"
            self.problem = f"writer {self.writer}: {missing}, which a checkpoint signed, were removed from the end"


def find_break(rows: Iterable[AuditRow]) -> str | None:
    """What is wrong with one writer's rows, in order of seq; None if the chain holds."""
    chain: Chain | None = None
    for row in rows:
        chain = chain or Chain(row.writer)
        if row.writer != chain.writer:
            return f"writer {chain.writer}: row {row.seq} was changed"
        chain.add(row.seq, row.at, row.action, row.actor, row.tenant_ref, row.details, row.prev_hash, row.hash)
    return chain.problem if chain else None
