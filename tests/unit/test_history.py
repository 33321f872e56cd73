"""Which key version sealed which positions: the ranges after a re-encryption, against counting them one by one."""

from itertools import groupby
from random import Random
from uuid import UUID

from sidecar.core.history import Range, overlaid

KEYS = [UUID(int=n) for n in range(4)]


def ranges_of(keys: list[UUID]) -> list[Range]:
    found, at = [], 1
    for key, run in groupby(keys):
        count = len(list(run))
        found.append(Range(key, 1, at, at + count - 1))
        at += count
    return [*found[:-1], found[-1]._replace(last=None)]


def test_ranges_say_of_every_position_under_which_key_it_is() -> None:
    random = Random(7)
    for _ in range(500):
        keys = random.choices(KEYS[:3], k=random.randint(1, 30))
        chosen = sorted(random.sample(range(1, len(keys) + 1), random.randint(1, len(keys))))
        after = [KEYS[3] if n in chosen else key for n, key in enumerate(keys, start=1)]
        assert overlaid(ranges_of(keys), chosen, KEYS[3], 1, len(keys)) == ranges_of(after)


def test_a_stream_that_was_plain_begins_with_the_first_sealed_position() -> None:
    assert overlaid([], [3, 4, 5], KEYS[0], 1, 5) == [Range(KEYS[0], 1, 3, None)]
    assert overlaid([Range(KEYS[0], 1, 3, None)], [1, 2], KEYS[0], 1, 5) == [Range(KEYS[0], 1, 1, None)]


def test_a_writer_that_has_begun_under_the_new_key_goes_on() -> None:
    began = [Range(KEYS[0], 1, 1, 9), Range(KEYS[0], 2, 10, None)]
    assert overlaid(began, [8, 9], KEYS[0], 2, 12) == [Range(KEYS[0], 1, 1, 7), Range(KEYS[0], 2, 8, None)]
