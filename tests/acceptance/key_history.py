"""The checker of `stream_key_history`: does it say, to the position, what every event's envelope says?"""

from itertools import groupby
from typing import Any
from uuid import UUID

from sidecar.core.envelope import parse_header
from sidecar.core.model import ScopeKind
from tests.acceptance.world import World

Range = tuple[UUID, int, int, int | None]
"""key id, version, first position, last position; None: still in use."""


def key_history_faults(world: World) -> list[str]:
    """What is wrong; [] if every stream's ranges are exact, and of stream, class and tenant keys contiguous and without overlap.

    Persons' ranges overlap by nature: theirs begin at the first event of the key version, and hold all of its events.
    """
    events: dict[tuple[str, str], list[tuple[int, UUID, int, bool]]] = {}
    for row in world.sql("SELECT * FROM messages WHERE data_encrypted IS NOT NULL ORDER BY tenant_id, stream_id, stream_position"):
        header = parse_header(bytes(row["data_encrypted"]))
        event = (row["stream_position"], header.key_id, header.key_version, header.scope_kind is ScopeKind.SUBJECT)
        events.setdefault((row["tenant_id"], row["stream_id"]), []).append(event)
    kinds = {(row["key_id"], row["key_version"]): row["scope_kind"] for row in world.sql("SELECT * FROM encryption_keys")}
    ranges: dict[tuple[str, str], list[Range]] = {}
    for row in world.sql("SELECT * FROM stream_key_history ORDER BY used_from_position"):
        found = (row["key_id"], row["key_version"], row["used_from_position"], row["used_to_position"])
        ranges.setdefault((row["tenant_id"], row["stream_id"]), []).append(found)
    faults = [f"{at}: ranges without an event" for at in ranges.keys() - events.keys()]
    for at, of in events.items():
        own = joined([r for r in ranges.get(at, []) if kinds.get(r[:2]) != "subject"])
        if own != (runs := runs_of(of)):
            faults.append(f"{at}: ranges {readable(own)}, events {readable(runs)}")
        faults += [f"{at}: {fault}" for fault in persons_faults([r for r in ranges.get(at, []) if kinds.get(r[:2]) == "subject"], of)]
    return faults


def runs_of(events: list[tuple[int, UUID, int, bool]]) -> list[Range]:
    """Of keys that are no person's: a range for each run of one version; the last one is open, unless persons' events follow."""
    found: list[Range] = []
    for (key, version, personal), run in groupby(events, lambda e: (None, 0, True) if e[3] else (e[1], e[2], False)):
        positions = [e[0] for e in run]
        if key is not None and not personal:
            found.append((key, version, positions[0], positions[-1]))
    if found and found[-1][3] == events[-1][0]:
        found[-1] = (*found[-1][:3], None)
    return found


def joined(ranges: list[Range]) -> list[Range]:
    """Two ranges of one version, side by side, say what one says: a writer that begins behind events that were sealed anew makes the second."""
    out: list[Range] = []
    for key, version, first, last in ranges:
        before = out[-1] if out else None
        if before is not None and before[:2] == (key, version) and before[3] is not None and before[3] + 1 == first:
            out[-1] = (*before[:3], last)
        else:
            out.append((key, version, first, last))
    return out


def persons_faults(rows: list[Range], events: list[tuple[int, UUID, int, bool]]) -> list[str]:
    faults = []
    first: dict[tuple[UUID, int], int] = {}
    for position, key, version, personal in events:
        if personal:
            first.setdefault((key, version), position)
            covering = [r for r in rows if r[:2] == (key, version) and r[2] <= position and (r[3] is None or position <= r[3])]
            if len(covering) != 1:
                faults.append(f"{len(covering)} ranges hold position {position}")
    begun = {}
    for key, version, begin, _ in rows:
        begun.setdefault((key, version), begin)
    return faults + [f"a person's range begins at {begun.get(key)}, the events at {at}" for key, at in first.items() if begun.get(key) != at]


def readable(ranges: list[Range]) -> list[Any]:
    return [(str(key)[:4], *rest) for key, *rest in ranges]
