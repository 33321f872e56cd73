"""What the pages of docs/ name is there: tests by their names, pages by their links."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def missing_tests(text: str) -> list[str]:
    """Of the tests that a page names as `path::name`, those that there are not."""
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    return [f"{path}::{name}" for path, name in named if not (ROOT / path).exists() or f"def {name}(" not in (ROOT / path).read_text()]


def dead_links(page: Path, text: str) -> list[str]:
    """Of a page's links into the repository, those that lead nowhere."""
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]*)?\)", text)
    return [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    assert not missing_tests(text)
    assert not dead_links(page, text)


def test_hard_cases_are_all_in_the_table() -> None:
    table = (DOCS / "library.md").read_text().partition("<!-- hard cases -->")[2].partition("<!-- /hard cases -->")[0]
    assert [int(n) for n in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)] == [*range(1, 17)]
    assert len(re.findall(r"`tests/\S+::test_\w+`", table)) == 18


def test_control_a_test_and_a_page_that_are_not_there_are_noticed() -> None:
    assert missing_tests("`tests/unit/test_docs_pages.py::test_of_nothing`, `tests/none.py::test_what_a_page_names_is_there`") == [
        "tests/unit/test_docs_pages.py::test_of_nothing",
        "tests/none.py::test_what_a_page_names_is_there",
    ]
    assert dead_links(DOCS / "library.md", "[a](library.md#reading) [b](nowhere.md) [c](https://example.org/x)") == ["nowhere.md"]
