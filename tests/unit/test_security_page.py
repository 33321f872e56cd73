"""docs/security.md: what its mapping calls evidence can be had; each command, certificate field and section of the report is there."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from sidecar import cli
from sidecar.core.certificate import FIELDS
from sidecar.reports import SECTIONS

TEXT = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
MAPPING = TEXT.partition("<!-- mapping -->")[2].partition("<!-- /mapping -->")[0]


@pytest.fixture(scope="module")
def commands() -> typer.core.TyperGroup:
    cli._assemble()
    return typer.main.get_command(cli.app)  # type: ignore[return-value]


def rows() -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in MAPPING.strip().splitlines()[2:]]


def unfounded(shown: str, commands: typer.core.TyperGroup) -> Iterator[str]:
    """What is named as evidence and cannot be had."""
    for words in re.findall(r"`sidecar ([a-z -]+)`", shown):
        node = commands
        for word in words.split():
            node = getattr(node, "commands", {}).get(word)
            if node is None:
                yield f"sidecar {words}"
                break
    for fields in re.findall(r"certificate ((?:`\w+`(?:, )?)+)", shown):
        yield from set(re.findall(r"`(\w+)`", fields)) - FIELDS
    for titles in re.findall(r"report: ([^;|]+)", shown):
        yield from set(titles.strip().split(", ")) - {section.title for section in SECTIONS}


def test_each_row_of_the_mapping_names_evidence_that_can_be_had_and_what_stays(commands: typer.core.TyperGroup) -> None:
    assert {row[0].split()[0] for row in rows()} == {"GDPR", "CCPA", "SOC", "HIPAA"}
    for row in rows():
        assert len(row) == 5, row
        assert all(row), row
        assert re.search(r"`sidecar |certificate `|report: ", row[3]), row
        assert [*unfounded(row[3], commands)] == [], row


def test_control_evidence_that_nobody_gives_is_noticed(commands: typer.core.TyperGroup) -> None:
    named = "`sidecar evidence invent`, `sidecar prove`; certificate `events`, `compliant`; report: Keys, Compliance"
    assert [*unfounded(named, commands)] == ["sidecar evidence invent", "sidecar prove", "compliant", "Compliance"]


def test_page_claims_no_compliance() -> None:
    assert not re.search(r"\b(compliant|certified|guarantees compliance|complies)\b", TEXT, re.IGNORECASE)
