"""Which key version sealed which positions of a stream, as ranges, after some of the positions were sealed anew."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple
from uuid import UUID


class Range(NamedTuple):
    """Positions under one key version; `last` None: still in use."""

    key_id: UUID
    key_version: int
    first: int
    last: int | None


def overlaid(ranges: Sequence[Range], positions: Sequence[int], key_id: UUID, key_version: int, head: int) -> list[Range]:
    """`ranges` once these positions (ascending) are under that version. What holds the stream's last event, at `head`, is the one still in use."""
    runs = list(_runs(positions))
    kept = [piece for old in ranges for piece in _outside(old, runs)]
    kept = [piece for piece in kept if piece.first <= head]
    kept += [Range(key_id, key_version, first, last) for first, last in runs]
    out: list[Range] = []
    for piece in sorted(kept, key=lambda r: r.first):
        before = out[-1] if out else None
        if before is not None and before.last is not None and before[:2] == piece[:2] and before.last + 1 == piece.first:
            out[-1] = before._replace(last=piece.last)
        else:
            out.append(piece)
    if out and out[-1].last is not None and out[-1].last >= head:
        out[-1] = out[-1]._replace(last=None)
    return out


def without(ranges: Sequence[Range], positions: Sequence[int], head: int) -> list[Range]:
    """`ranges` of keys that are no person's, once these positions (ascending) are under persons' keys."""
    runs = list(_runs(positions))
    return [piece for old in ranges for piece in _outside(old, runs) if piece.first <= head]


def extended(ranges: Sequence[Range], positions: Sequence[int], key_id: UUID, key_version: int) -> list[Range]:
    """`ranges` of one version of a person's key, once it seals these positions (ascending) of the stream too; others' events stand in between.

    At most two: what was sealed anew, and behind it what its writers began.
    """
    new = [at for at in positions if not any(r.first <= at and (r.last is None or at <= r.last) for r in ranges)]
    if not new:
        return list(ranges)
    closed = [r for r in ranges if r.last is not None]
    first, last = min([new[0], *(r.first for r in closed)]), max([new[-1], *(r.last for r in closed if r.last is not None)])
    return [Range(key_id, key_version, first, last), *(r for r in ranges if r.last is None)]


def _runs(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for n, position in enumerate(positions):
        if n + 1 == len(positions) or positions[n + 1] != position + 1:
            yield positions[start], position
            start = n + 1


def _outside(old: Range, runs: Sequence[tuple[int, int]]) -> Iterator[Range]:
    """What is left of a range beside the runs."""
    at = old.first
    for first, last in runs:
        if last < at or (old.last is not None and first > old.last):
            continue
        if first > at:
            yield old._replace(first=at, last=first - 1)
        at = last + 1
    if old.last is None or at <= old.last:
        yield old._replace(first=at)
