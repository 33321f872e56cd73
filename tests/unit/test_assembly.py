"""The command line loads what the command needs, and what a person could type is all there."""

from importlib import import_module

import pytest
import typer

from sidecar import cli


def assembled(monkeypatch: pytest.MonkeyPatch, *words: str) -> set[str]:
    """The nouns that are there after these words were typed."""
    monkeypatch.setattr(cli, "app", app := typer.Typer())
    app.callback()(lambda: None)
    cli._assemble(words)
    return set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_without_a_known_word_every_command_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    every = {name for names in cli._TOP_LEVEL.values() for name in names} | set(cli._GROUPS)
    assert assembled(monkeypatch) == assembled(monkeypatch, "--help") == assembled(monkeypatch, "nonsense") == every


@pytest.mark.parametrize("module", cli._TOP_LEVEL)
def test_a_module_adds_the_commands_that_it_is_said_to_add(module: str) -> None:
    app = typer.Typer()
    app.callback()(lambda: None)
    import_module(f"sidecar.cli.{module}").add_to(app)
    assert set(typer.main.get_command(app).commands) == set(cli._TOP_LEVEL[module])  # type: ignore[attr-defined]


def test_a_known_word_loads_its_own_and_the_value_of_an_option_is_no_such_word(monkeypatch: pytest.MonkeyPatch) -> None:
    assert assembled(monkeypatch, "events", "list") == {"events"}
    assert assembled(monkeypatch, "--config", "events", "-o", "json", "shred") == set(cli._TOP_LEVEL["commands"])
