"""The audit chain: each row's hash covers the one before, so a changed, removed or reordered row shows.

    hash = SHA-256(LP("ks/audit/v1", prev_hash, writer, u64 seq, at, action, actor, tenant_ref, details))

`at` is ISO 8601 in UTC with microseconds, `details` canonical JSON (sorted names, no white space). A removal of the
newest rows does not show in the chain alone.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from sidecar.core.aead import lp, u64
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


def link(prev: bytes, *, writer: str, seq: int, at: datetime, action: str, actor: str, tenant_ref: bytes | None, details: dict[str, Any]) -> AuditRow:
    """The next row of a chain whose newest hash is `prev` (GENESIS for the first)."""
    moment = at.astimezone(UTC).isoformat(timespec="microseconds")
    canonical = json.dumps(details, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    parts = (prev, writer.encode(), u64(seq), moment.encode(), action.encode(), actor.encode(), tenant_ref or b"", canonical.encode())
    digest = sha256(lp(b"ks/audit/v1", *parts)).digest()
    return AuditRow(writer=writer, seq=seq, at=at, action=action, actor=actor, tenant_ref=tenant_ref, details=details, prev_hash=prev, hash=digest)


def find_break(rows: Iterable[AuditRow]) -> str | None:
    """What is wrong with one writer's rows, in order of seq; None if the chain holds."""
    prev, expected = GENESIS, 1
    for row in rows:
        if row.seq != expected:
            return f"writer {row.writer}: row {expected} is missing"
        again = link(
            prev,
            writer=row.writer,
            seq=row.seq,
            at=row.at,
            action=row.action,
            actor=row.actor,
            tenant_ref=row.tenant_ref,
            details=row.details,
        )
        if row.prev_hash != prev or row.hash != again.hash:
            return f"writer {row.writer}: row {row.seq} was changed"
        prev, expected = row.hash, expected + 1
    return None
