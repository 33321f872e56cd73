"""The ledger's entries: what a database that was restored, or failed over, must be told before it serves again.

An entry says which act (shred, hold, release, readmit) befell which scope, by pseudonym, and below which source offsets records are refused.
It holds no key, no tenant's name and no scope's. Entries are never superseded: each stands for itself, under its own id.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, get_args
from uuid import UUID

from sidecar.core.errors import MalformedEnvelope
from sidecar.core.model import ScopeKind

PAYLOAD_TYPE = "application/vnd.sidecar.ledger.v1+json"
Act = Literal["shred", "hold", "release", "readmit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceEnd:
    """A source partition's log end offset at the moment of a shred. The topic's id, not its name, is what counts."""

    topic: str
    topic_id: str
    partition: int
    end_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """`generation` is the tenant's behind the act. `undoes`: the command that this one takes back (a release its hold's, a restore its shred's).

    `kept_until`: of a shred with a grace, when that ends. `include_plain`: it deletes plain events too.
    """

    entry_id: UUID
    command_id: UUID
    deployment: str
    act: Act
    at: datetime
    tenant_ref: bytes
    kind: ScopeKind
    scope_ref: bytes
    generation: int
    sources: tuple[SourceEnd, ...] = ()
    keys_sha256: str | None = None
    undoes: UUID | None = None
    kept_until: datetime | None = None
    include_plain: bool = False

    def to_bytes(self) -> bytes:
        sources: dict[str, dict[str, Any]] = {}
        for end in self.sources:
            sources.setdefault(end.topic_id, {"topic": end.topic, "ends": {}})["ends"][str(end.partition)] = end.end_offset
        document = {
            "entry_id": str(self.entry_id),
            "command_id": str(self.command_id),
            "deployment": self.deployment,
            "act": self.act,
            "at": self.at.isoformat(),
            "tenant_ref": self.tenant_ref.hex(),
            "scope": {"kind": self.kind.value, "ref": self.scope_ref.hex()},
            "generation": self.generation,
            "sources": sources,
            "keys_sha256": self.keys_sha256,
            "undoes": self.undoes and str(self.undoes),
            "kept_until": self.kept_until and self.kept_until.isoformat(),
            "include_plain": self.include_plain,
        }
        return json.dumps(document, separators=(",", ":")).encode()


def parse_entry(payload: bytes) -> Entry:
    """From a payload whose signature was verified. Raises MalformedEnvelope."""
    try:
        body = json.loads(payload)
        if body["act"] not in get_args(Act):
            raise ValueError
        ends = (
            SourceEnd(topic=of["topic"], topic_id=topic_id, partition=int(partition), end_offset=int(offset))
            for topic_id, of in body["sources"].items()
            for partition, offset in of["ends"].items()
        )
        return Entry(
            entry_id=UUID(body["entry_id"]),
            command_id=UUID(body["command_id"]),
            deployment=body["deployment"],
            act=body["act"],
            at=datetime.fromisoformat(body["at"]),
            tenant_ref=bytes.fromhex(body["tenant_ref"]),
            kind=ScopeKind(body["scope"]["kind"]),
            scope_ref=bytes.fromhex(body["scope"]["ref"]),
            generation=int(body["generation"]),
            sources=tuple(ends),
            keys_sha256=body["keys_sha256"],
            undoes=UUID(body["undoes"]) if body["undoes"] else None,
            kept_until=datetime.fromisoformat(body["kept_until"]) if body["kept_until"] else None,
            include_plain=bool(body.get("include_plain")),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise MalformedEnvelope("this is no entry of a ledger") from None
