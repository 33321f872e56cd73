"""Audit checkpoints: signed now and then, kept in the database and on a topic, and held against the trail by `sidecar audit verify`.

Who can delete audit rows can delete checkpoints from the database too, so those on the topic count as much.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from sidecar import telemetry
from sidecar.core import checkpoint
from sidecar.core.audit import Chain
from sidecar.core.checkpoint import SignedHeads
from sidecar.core.dsse import Signer
from sidecar.core.errors import AuthenticationFailed, MalformedEnvelope
from sidecar.kafka import journal
from sidecar.kafka.receipts import ViewRecord, ViewWriter
from sidecar.ports import Clock
from sidecar.postgres import audit, signed_heads
from sidecar.postgres.connection import Connection, Pool, transaction
from sidecar.settings import Settings


class Checkpoints:
    """The control plane's timer: signs the heads of all chains when one has moved."""

    def __init__(self, settings: Settings, pool: Pool, signer: Signer, writer: ViewWriter, clock: Clock) -> None:
        self._settings, self._pool, self._signer, self._writer, self._clock = settings, pool, signer, writer, clock

    async def sign(self) -> bool:
        """True if a checkpoint was made. One that is not on the topic yet goes there first; a crash may put one there twice."""
        async with transaction(self._pool) as connection:
            heads = await signed_heads.heads(connection)
            moved = bool(heads) and {head.writer: head.seq for head in heads} != await signed_heads.newest_heads(connection)
            if moved:
                now = self._clock.now()
                signed = checkpoint.sign(self._settings.deployment, now, heads, self._signer)
                await signed_heads.add(connection, now, heads, signed.to_bytes())
        await self._publish()
        return moved

    async def _publish(self) -> None:
        async with transaction(self._pool) as connection:
            waiting = await signed_heads.unpublished(connection)
        if not waiting:
            return
        topic, key = self._settings.audit.topic, self._settings.deployment.encode()
        await asyncio.to_thread(self._writer.write, [ViewRecord(topic=topic, partition=0, key=key, value=envelope) for _, envelope in waiting])
        async with transaction(self._pool) as connection:
            await signed_heads.mark_published(connection, [identity for identity, _ in waiting])
        telemetry.log.info("checkpoint", extra={"action": "checkpoint", "count": len(waiting)})


@dataclass
class Found:
    """The checkpoints that there are, and what is wrong with them."""

    signed: SignedHeads = field(default_factory=SignedHeads)
    problems: list[str] = field(default_factory=list)


async def find(settings: Settings, connection: Connection, keys: Mapping[str, Ed25519PublicKey], *, offline: bool) -> Found:
    """Read them from the database and, unless offline, from the topic. Raises BrokerUnavailable: what was not read was not checked."""
    found = Found()

    def add(raw: bytes, where: str) -> None:
        try:
            _, heads = checkpoint.read(raw, settings.deployment, keys)
        except (AuthenticationFailed, MalformedEnvelope) as error:
            found.problems.append(f"checkpoint {where} does not verify: {error}")
            return
        if wrong := found.signed.add(heads):
            found.problems.append(f"checkpoint {where}: {wrong}")

    kept: dict[bytes, tuple[int, bool]] = {}
    async for identity, envelope, published in signed_heads.envelopes(connection):
        kept[sha256(envelope).digest()] = (identity, published)
        add(envelope, f"{identity} of the database")
    if offline:
        return found

    def read_topic() -> None:
        for partition, offset, key, value in journal.read(settings, settings.audit.topic):
            if key != settings.deployment.encode():
                continue
            raw, where = value or b"", f"{settings.audit.topic}/{partition}/{offset}"
            digest = sha256(raw).digest()
            if digest in kept:
                there.add(digest)
                continue
            before = len(found.problems)
            add(raw, where)
            if len(found.problems) == before:
                strays[digest] = where

    there: set[bytes] = set()
    strays: dict[bytes, str] = {}
    await asyncio.to_thread(read_topic)
    if strays:  # one may have been made since the database was read
        now = {sha256(envelope).digest() async for _, envelope, _ in signed_heads.envelopes(connection)}
        found.problems += [f"checkpoint {where} is not in the database any more" for digest, where in strays.items() if digest not in now]
    gone = [identity for digest, (identity, published) in kept.items() if published and digest not in there]
    found.problems += [f"checkpoint {identity} of the database is not on the topic {settings.audit.topic} any more" for identity in gone]
    return found


async def verify(settings: Settings, connection: Connection, keys: Mapping[str, Ed25519PublicKey], *, offline: bool = False) -> list[dict[str, Any]]:
    """A row per chain, and one per thing that is wrong with a checkpoint; without keys checkpoints are not looked at.

    Raises ConfigurationError where this role sees only a part.
    """
    await audit.refuse_a_part(connection)
    found = await find(settings, connection, keys, offline=offline) if keys else Found()
    rows = [_shown(chain) async for chain in audit.chains(connection, found.signed.of)]
    return rows + [{"writer": None, "seq": None, "ok": False, "problem": problem} for problem in found.problems]


def _shown(chain: Chain) -> dict[str, Any]:
    return {
        "writer": chain.writer,
        "seq": chain.seq,
        "ok": chain.problem is None,
        "problem": chain.problem,
        "covered_seq": chain.covered_seq,
        "covered_at": chain.covered_at,
        "uncovered_since": chain.uncovered_since,
    }
