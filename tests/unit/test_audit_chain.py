"""The audit chain shows a row that was changed, removed, put in, or moved."""

import json
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.audit import GENESIS, AuditRow, Chain, canonical, find_break, link, tenant_ref
from tests.unit import independent_decoder as second

START = datetime(2026, 11, 23, 12, tzinfo=UTC)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
# What JSONB gives back as it took it: no floats, whole numbers that 64 bits hold.
details = st.dictionaries(
    texts,
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | texts,
        lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
        max_leaves=6,
    ),
    max_size=4,
)


def chain(all_details: list[dict[str, Any]]) -> list[AuditRow]:
    rows: list[AuditRow] = []
    for number, detail in enumerate(all_details, start=1):
        row = link(
            rows[-1].hash if rows else GENESIS,
            writer="control-0",
            seq=number,
            at=START + timedelta(microseconds=number),
            action="rotate",
            actor="dpo@example.org",
            tenant_ref=tenant_ref("acme"),
            details=detail,
        )
        rows.append(row)
    return rows


ROWS = chain([{"n": n, "keys": ["a", "b"]} for n in range(6)])


@given(st.lists(details, max_size=5))
def test_chain_holds_and_holds_after_a_trip_through_jsonb(all_details: list[dict[str, Any]]) -> None:
    rows = chain(all_details)
    assert find_break(rows) is None
    # JSONB keeps no order of names, another time zone is the same moment
    shuffled = [dict(reversed(orjson.loads(orjson.dumps(row.details)).items())) for row in rows]
    berlin = timezone(timedelta(hours=1))
    again = [replace(row, details=d, at=row.at.astimezone(berlin)) for row, d in zip(rows, shuffled, strict=True)]
    assert find_break(again) is None


@given(details)
def test_second_decoder_computes_the_same_hash(detail: dict[str, Any]) -> None:
    row = chain([detail])[0]
    assert row.tenant_ref is not None
    as_row = {"writer": row.writer, "seq": 1, "at": row.at.isoformat(timespec="microseconds"), "action": row.action, "actor": row.actor}
    assert second.audit_hash(as_row | {"tenant_ref": row.tenant_ref.hex(), "details": detail}, GENESIS) == row.hash


@given(details | st.integers(-(2**80), 2**80))
def test_canonical_form_is_the_documented_one(detail: Any) -> None:
    """Sorted names, no white space, non-ASCII as it is: as Python's own writer has it, which defined it first."""
    assert canonical(detail) == json.dumps(detail, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def checked(rows: list[AuditRow], signed: dict[int, bytes]) -> Chain:
    chain = Chain("control-0", signed)
    for row in rows:
        chain.add(row.seq, row.at, row.action, row.actor, row.tenant_ref, row.details, row.prev_hash, row.hash)
    chain.end()
    return chain


def test_rows_up_to_the_newest_checkpoint_are_covered_and_later_ones_are_not() -> None:
    chain = checked(ROWS, {2: ROWS[1].hash, 4: ROWS[3].hash})
    assert (chain.problem, chain.covered_seq, chain.covered_at, chain.uncovered_since) == (None, 4, ROWS[3].at, ROWS[4].at)
    chain = checked(ROWS, {6: ROWS[5].hash})
    assert (chain.problem, chain.covered_seq, chain.uncovered_since) == (None, 6, None)
    chain = checked(ROWS, {})
    assert (chain.problem, chain.covered_seq, chain.uncovered_since) == (None, None, ROWS[0].at)


@pytest.mark.parametrize(("left", "said"), [(5, "row 6, which"), (3, "rows 4 to 6, which"), (0, "rows 1 to 6, which")])
def test_removal_of_the_newest_rows_shows_against_a_checkpoint(left: int, said: str) -> None:
    assert said in str(checked(ROWS[:left], {2: ROWS[1].hash, 6: ROWS[5].hash}).problem)
    assert checked(ROWS[:left], {}).problem is None, "control: the chain alone does not show it"


def test_chain_that_was_written_anew_from_some_row_on_shows_against_a_checkpoint() -> None:
    anew = chain([{"n": n, "keys": ["a", "b"] if n < 3 else []} for n in range(6)])
    assert checked(anew, {}).problem is None, "control: it is a chain"
    assert checked(anew, {2: ROWS[1].hash}).problem is None, "control: signed before the change"
    assert "row 5 is not the one that a checkpoint signed" in str(checked(anew, {2: ROWS[1].hash, 5: ROWS[4].hash, 6: anew[5].hash}).problem)


CHANGES: dict[str, Any] = {
    "writer": "control-1",
    "seq": 9,
    "at": START,
    "action": "shred",
    "actor": "somebody",
    "tenant_ref": tenant_ref("globex"),
    "details": {"n": 4, "keys": ["a"]},
    "prev_hash": bytes(32),
    "hash": bytes(32),
}


def test_changes_cover_every_column() -> None:
    assert {field.name for field in fields(AuditRow)} == CHANGES.keys()


@pytest.mark.parametrize("column", CHANGES)
@pytest.mark.parametrize("at", [1, 5])
def test_changed_column_shows(column: str, at: int) -> None:
    rows = list(ROWS)
    rows[at] = replace(rows[at], **{column: CHANGES[column]})
    assert find_break(rows) is not None


def hash_blind_to(column: str) -> AuditRow | None:
    """Control: row 2 with one column changed and its own hash written anew, which only the next row can show."""
    if column in ("hash", "prev_hash", "seq", "writer"):  # a row of another writer does not belong to the chain at all
        return None
    arguments = {name: getattr(ROWS[1], name) for name in CHANGES if name not in ("hash", "prev_hash")}
    return link(ROWS[0].hash, **(arguments | {column: CHANGES[column]}))


@pytest.mark.parametrize("column", [c for c in CHANGES if hash_blind_to(c)])
def test_row_that_was_changed_and_hashed_anew_breaks_the_next(column: str) -> None:
    forged = hash_blind_to(column)
    assert forged is not None
    assert find_break([ROWS[0], forged]) is None, "control: the newest row alone cannot show it"
    assert find_break([ROWS[0], forged, *ROWS[2:]]) is not None


@pytest.mark.parametrize("at", range(5))
def test_removed_row_shows_unless_it_is_the_newest(at: int) -> None:
    assert find_break(ROWS[:at] + ROWS[at + 1 :]) == f"writer control-0: row {at + 1} is missing"
    assert find_break(ROWS[:-1]) is None


def test_reordered_repeated_and_inserted_rows_show() -> None:
    assert find_break([ROWS[1], ROWS[0], *ROWS[2:]]) is not None
    assert find_break([*ROWS[:3], ROWS[2], *ROWS[3:]]) is not None
    assert find_break([*ROWS[:2], chain([{}])[0], *ROWS[2:]]) is not None
    assert find_break([]) is None


def test_pseudonym_of_a_tenant_is_16_bytes_and_not_its_name() -> None:
    assert len(tenant_ref("acme")) == 16
    assert tenant_ref("acme") == second.tenant_ref("acme") != tenant_ref("globex")
