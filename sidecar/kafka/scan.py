"""What still stands in a view topic, committed or not. Blocks: run it with `asyncio.to_thread`."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from sidecar.kafka.reading import read
from sidecar.settings import Settings

Belongs = Callable[[str, str, str, int], bool]
"""(tenant, stream, class, position) of a view record: is it one of those that are looked for?"""

_NAMES: Final = frozenset({"ce_tenantid", "ce_streamid", "ce_streamtype", "ce_streamposition"})


AT_A_TIME: Final = 500
"""Records, of some 10 µs each, between two calls of `stand_back`."""


def payloads(
    settings: Settings, topic: str, span: Mapping[int, tuple[int, int]], belongs: Belongs, stand_back: Callable[[], None]
) -> dict[tuple[int, str], tuple[int, int]]:
    """Records with a value, from an offset to below another of each partition; -> (partition, stream) → how many, newest position.

    Aborted ones count too: their bytes are on the broker's disk like any other's. Notices have no stream and do not count.
    """
    found: dict[tuple[int, str], tuple[int, int]] = {}
    for number, message in enumerate(read(settings, topic, span, committed=False)):
        if number % AT_A_TIME == 0:
            stand_back()
        if message.value() is None:
            continue
        carried: Any = message.headers() or ()
        headers = {name: (value or b"").decode("utf-8", "replace") for name, value in carried if name in _NAMES}
        position = headers.get("ce_streamposition", "")
        if position.isdigit() and belongs(
            headers.get("ce_tenantid", ""), headers.get("ce_streamid", ""), headers.get("ce_streamtype", ""), int(position)
        ):
            at = (message.partition() or 0, headers["ce_streamid"])
            count, newest = found.get(at, (0, 0))
            found[at] = (count + 1, max(newest, int(position)))
    return found
