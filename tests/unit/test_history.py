"""Which key version sealed which positions: the ranges after a re-encryption, against counting them one by one."""

from itertools import groupby
from random import Random
from uuid import UUID

from sidecar.core.history import Range, extended, overlaid, without

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


def test_what_goes_under_persons_keys_is_taken_out_of_the_ranges_of_others() -> None:
    random = Random(8)
    for _ in range(500):
        keys = random.choices(KEYS[:3], k=random.randint(1, 30))
        chosen = set(random.sample(range(1, len(keys) + 1), random.randint(1, len(keys))))
        after = without(ranges_of(keys), sorted(chosen), len(keys))
        left = {at: r.key_id for r in after for at in range(r.first, (r.last or len(keys)) + 1)}
        assert left == {at: key for at, key in enumerate(keys, start=1) if at not in chosen}


def test_a_persons_range_holds_every_event_of_the_version_once_and_begins_with_the_first() -> None:
    random = Random(9)
    for _ in range(500):
        begun = random.randint(2, 30)
        ranges = [Range(KEYS[0], 2, begun, None)] if random.random() < 0.5 else []
        sealed: set[int] = {begun} if ranges else set()
        for _ in range(random.randint(1, 4)):  # steps, from behind or not
            step = sorted(random.sample(range(1, begun), random.randint(1, begun - 1)))
            ranges = extended(ranges, step, KEYS[0], 2)
            sealed |= set(step)
        assert min(r.first for r in ranges) == min(sealed)
        for at in sealed:
            assert len([r for r in ranges if r.first <= at and (r.last is None or at <= r.last)]) == 1
    assert extended([Range(KEYS[0], 1, 1, None)], [3, 4], KEYS[0], 1) == [Range(KEYS[0], 1, 1, None)]
