"""docs/troubleshooting.md quotes what the code says: each message and each code of its first columns stands in sidecar/."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "troubleshooting.md").read_text()
_QUOTE = re.compile(r"``(.+?)``|`([^`]+)`")


@cache
def said_by_the_code() -> frozenset[str]:
    """Every string in sidecar/, with `…` for what is put in."""
    files = [*(ROOT / "sidecar").rglob("*.py"), *(ROOT / "schemas").rglob("*.sql")]
    out = {text for file in files if file.suffix == ".sql" for text in re.findall(r"'([^']*)'", file.read_text())}
    for file in files:
        if file.suffix == ".py":
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    out.add("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    out.add(node.value)
    return frozenset(out)


def quoted(heading: str) -> list[str]:
    """The code spans of a table's first column."""
    section = TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    return [double or single for row in rows for double, single in _QUOTE.findall(row)]


def is_said(message: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in message.split("…"))
    return len(message.replace("…", "")) >= 8 and any(re.search(pattern, text) for text in said_by_the_code())


MESSAGES = ("It does not start", "It waits", "An event is missing, or does not open", "It is not gone yet")


@pytest.mark.parametrize("heading", MESSAGES)
def test_messages_are_those_of_the_code(heading: str) -> None:
    messages = quoted(heading)
    assert len(messages) >= 4
    assert [message for message in messages if not is_said(message)] == []


def test_codes_of_refused_commands_are_those_of_the_code() -> None:
    codes = quoted("A command is refused")
    assert len(codes) >= 15
    assert [code for code in codes if code not in said_by_the_code()] == []


def test_control_a_message_that_nobody_says_is_noticed() -> None:
    assert is_said("there is no configuration file")
    assert not is_said("there is no konfiguration file")
    assert not is_said("…")
    assert "no_such_code" not in said_by_the_code()
