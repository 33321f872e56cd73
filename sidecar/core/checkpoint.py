"""Audit checkpoints: the heads of all chains at one moment, signed. Rows up to a head cannot be removed or written anew unseen.

Payload, canonical JSON: {"deployment", "at", "heads": [{"writer", "seq", "hash", "at"}]}; `at` in UTC, hashes in hex.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import orjson
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from sidecar.core import dsse
from sidecar.core.audit import canonical
from sidecar.core.errors import MalformedEnvelope

PAYLOAD_TYPE: Final = "application/vnd.sidecar.audit-checkpoint.v1+json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The newest row of a writer's chain; `at` is when it was written."""

    writer: str
    seq: int
    hash: bytes
    at: datetime

    def to_json(self) -> dict[str, Any]:
        return {"writer": self.writer, "seq": self.seq, "hash": self.hash.hex(), "at": self.at.isoformat(timespec="microseconds")}


def sign(deployment: str, at: datetime, heads: Iterable[Head], signer: dsse.Signer) -> dsse.Signed:
    document = {"deployment": deployment, "at": at.isoformat(timespec="microseconds"), "heads": [head.to_json() for head in heads]}
    return dsse.sign(PAYLOAD_TYPE, canonical(document), [signer])


def read(raw: bytes, deployment: str, keys: Mapping[str, Ed25519PublicKey]) -> tuple[datetime, list[Head]]:
    """-> when it was signed, and what. Raises MalformedEnvelope, AuthenticationFailed; of another deployment is malformed too."""
    payload = dsse.verified(raw, PAYLOAD_TYPE, keys)
    try:
        document = orjson.loads(payload)
        if document["deployment"] != deployment:
            raise MalformedEnvelope("this checkpoint is of another deployment")
        heads = [
            Head(writer=head["writer"], seq=head["seq"], hash=bytes.fromhex(head["hash"]), at=datetime.fromisoformat(head["at"]))
            for head in document["heads"]
        ]
        return datetime.fromisoformat(document["at"]), heads
    except (KeyError, TypeError, ValueError):
        raise MalformedEnvelope("this is no checkpoint") from None


class SignedHeads:
    """What checkpoints say of each chain: writer → seq → hash. Of two that disagree the second is a contradiction."""

    def __init__(self) -> None:
        self.of: dict[str, dict[int, bytes]] = {}

    def add(self, heads: Iterable[Head]) -> str | None:
        """-> what is wrong: that another checkpoint signed something else."""
        wrong = None
        for head in heads:
            known = self.of.setdefault(head.writer, {}).setdefault(head.seq, head.hash)
            if known != head.hash:
                wrong = f"two checkpoints signed different rows {head.seq} of writer {head.writer}"
        return wrong
