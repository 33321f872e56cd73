"""docs/FORMAT.md says what the code does."""

import inspect
import re

import pytest

from sidecar.core import aead, audit, envelope, keys
from sidecar.core.keys import TRANSITIONS, KeyState
from sidecar.kms import file
from tests.unit.format_page import PAGE, filled, lifecycle

TEXT = PAGE.read_text()


def test_generated_blocks_are_those_of_the_table_and_the_vector() -> None:
    assert filled(TEXT) == TEXT, "run python -m tests.unit.format_page"


@pytest.mark.parametrize("state", list(KeyState))
def test_control_a_page_that_draws_another_table_is_noticed(state: KeyState) -> None:
    other = TRANSITIONS | {state: TRANSITIONS[state] ^ {KeyState.RETIRED}}
    assert lifecycle(other) not in TEXT
    assert lifecycle() in TEXT


def test_arrows_of_the_page_read_back_as_the_table() -> None:
    block = TEXT.partition("<!-- lifecycle -->")[2].partition("<!-- /lifecycle -->")[0]
    arrows = set(re.findall(r"^    (\w+) --> (\w+)$", block, re.MULTILINE))
    assert arrows == {(before.value, after.value) for before, afters in TRANSITIONS.items() for after in afters}


def test_page_names_every_label_and_domain_of_the_code() -> None:
    sources = "".join(inspect.getsource(module) for module in (aead, audit, envelope, keys, file))
    for domain in set(re.findall(r'b"(ks/[a-z-]+/v1)"', sources)):
        assert f'"{domain}"' in TEXT, domain
    for label in set(re.findall(r'expand\([^"]*"([a-z-]+)"', sources)):
        assert f"`{label}`" in TEXT, label


def test_offsets_of_the_page_are_those_of_the_code() -> None:
    rows = [(int(at), size) for at, size in re.findall(r"^\| (\d+) \| ([\dn +]+) \|", TEXT, re.MULTILINE)]
    assert [at for at, _ in rows] == [0, 2, 3, 4, 5, 21, 25, 37]
    assert rows[-1] == (envelope.HEADER_BYTES, f"n + {aead.TAG_BYTES}")
    assert sum(int(size) for _, size in rows[:-1]) == envelope.HEADER_BYTES
    assert f"Shorter than {envelope.OVERHEAD_BYTES} bytes" in TEXT
    assert f"{keys.WRAPPED_DEK_BYTES} bytes" in TEXT
