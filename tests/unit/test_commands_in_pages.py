"""Every `sidecar …` that a page shows, in a block or in a sentence, is a command that there is, with options that it has."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from sidecar import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").glob("*.py"))]
_LINE = re.compile(r"^(?:\s*|\$ )(?:\S+=\S+ )?(?:\.venv/bin/)?sidecar (.+)$")
_SPAN = re.compile(r"`sidecar ([^`]+)`")


@pytest.fixture(scope="module")
def commands() -> Any:
    cli._assemble()
    return typer.main.get_command(cli.app)


def shown(text: str) -> Iterator[str]:
    """What stands behind `sidecar`, one command each."""
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if (fenced or line.startswith("    ")) and (found := _LINE.match(line)):
            for part in re.split(r";\s*sidecar ", found[1].split("  ")[0].split(" #")[0].split(" → ")[0]):
                yield part.rstrip("; &")
        yield from _SPAN.findall(line)


def faults(command: str, root: Any) -> Iterator[str]:
    node, words = root, _words(command)
    while words:
        word = words.pop(0)
        if word in ("--config", "-o", "--output"):
            words = words[1:]
        elif word.startswith("--"):
            if word.partition("=")[0] not in {name for parameter in node.params for name in parameter.opts} | {"--help"}:
                yield f"{command}: no option {word}"
        elif children := getattr(node, "commands", None):
            names = re.split(r"[|,]", word)
            if missing := [name for name in names if name not in children]:
                yield f"{command}: no command {missing[0]}"
                return
            node = children[names[-1]]


def _words(command: str) -> list[str]:
    """Without the brackets of what may be left out, and without what is another's: a pipe, a file, three dots."""
    try:
        words = shlex.split(command, comments=True)
    except ValueError:
        words = command.split()
    words = [word.strip("[]….,:") for word in words]
    return [word for word in words if word and not re.match(r"[<>&]|--$|…", word)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_are_commands(page: Path, commands: Any) -> None:
    assert [fault for command in shown(page.read_text()) for fault in faults(command, commands)] == []


def test_pages_show_commands_at_all() -> None:
    assert sum(1 for page in PAGES for _ in shown(page.read_text())) > 150


def test_control_commands_and_options_that_there_are_not_are_noticed(commands: Any) -> None:
    page = "Say `sidecar shred --tenant T --hard`, then\n\n    sidecar keys burn --now    # for ever\n    SIDECAR_HTTP__PORT=1 sidecar control &\n"
    assert [fault for command in shown(page) for fault in faults(command, commands)] == [
        "shred --tenant T --hard: no option --hard",
        "keys burn --now: no command burn",
    ]
