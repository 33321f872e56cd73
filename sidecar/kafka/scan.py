"""What still stands in a view topic, committed or not. Blocks: run it with `asyncio.to_thread`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final
from uuid import UUID

from sidecar.kafka.reading import read
from sidecar.settings import Settings

Payloads = dict[tuple[int, str], tuple[int, int]]
"""(partition, stream) → how many records with a value, newest position."""

Whose = Callable[[int, int, str, str, str, int], Iterable[UUID]]
"""(partition, offset, tenant, stream, class, position) of a view record → the shreds that look for it."""

_NAMES: Final = frozenset({"ce_tenantid", "ce_streamid", "ce_streamtype", "ce_streamposition"})


AT_A_TIME: Final = 500
"""Records, of some 10 µs each, between two calls of `stand_back`."""


def payloads(
    settings: Settings, topic: str, span: Mapping[int, tuple[int, int]], whose: Whose, stand_back: Callable[[], None]
) -> dict[UUID, Payloads]:
    """What stands from an offset to below another of each partition, by the shreds that look for it.

    Aborted records count too: their bytes are on the broker's disk like any other's. Notices have no stream and do not count.
    """
    found: dict[UUID, Payloads] = {}
    for number, message in enumerate(read(settings, topic, span, committed=False)):
        if number % AT_A_TIME == 0:
            stand_back()
        if message.value() is None:
            continue
        carried: Any = message.headers() or ()
        headers = {name: (value or b"").decode("utf-8", "replace") for name, value in carried if name in _NAMES}
        position, stream, partition = headers.get("ce_streamposition", ""), headers.get("ce_streamid", ""), message.partition() or 0
        if not position.isdigit():
            continue
        named = headers.get("ce_tenantid", ""), stream, headers.get("ce_streamtype", ""), int(position)
        for shred in whose(partition, message.offset() or 0, *named):
            of_shred = found.setdefault(shred, {})
            count, newest = of_shred.get((partition, stream), (0, 0))
            of_shred[partition, stream] = (count + 1, max(newest, int(position)))
    return found
