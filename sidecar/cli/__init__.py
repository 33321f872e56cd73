"""The command line: one file per noun, assembled here. `--config` and `-o` may stand anywhere in a command."""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from sidecar.cli.context import Cli, Exit, guarded, say
from sidecar.memory import no_core_dumps

app = typer.Typer(
    name="sidecar",
    help="Encrypts personal data in Kafka events, keeps it in Postgres, and makes it unreadable on command.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    epilog="--config FILE and -o table|json may stand anywhere. Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 not allowed, 4 pending.",
)

# module -> the commands that it adds to the top level; group -> the module of that name, with its `app`
_TOP_LEVEL = {
    "init": ("init",), "run": ("run", "control", "worker"), "status": ("status",), "publish": ("publish", "subscribe"),
    "commands": ("rotate", "shred", "hold", "release", "readmit", "reencrypt"), "report": ("report",), "importing": ("import",),
}  # fmt: skip
_GROUPS = (
    "dev", "db", "config", "topics", "policy", "events", "keys", "kms", "issuer", "command", "holds", "receipts", "evidence", "audit", "ledger", "dlq", "jobs", "streams",
)  # fmt: skip
_COMMON = ("--config", "-o", "--output")


@app.callback()
def _options(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="The configuration file; else $SIDECAR_CONFIG, else ./sidecar.yaml.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="table or json.", metavar="table|json")] = None,
) -> None:
    if output not in (None, "table", "json"):
        raise typer.BadParameter("table or json", param_hint="-o")
    no_core_dumps()
    context.obj = Cli(config=config, output=output)


def _assemble(words: Sequence[str] = ()) -> None:
    """Of commands that are known by their first word, only what they need: the rest would take longer to load than they take to run."""
    values = {at + 1 for at, word in enumerate(words) if word in _COMMON}
    noun = next((word for at, word in enumerate(words) if at not in values and not word.startswith("-")), None)
    known = noun in _GROUPS or any(noun in commands for commands in _TOP_LEVEL.values())
    for name, commands in _TOP_LEVEL.items():
        if not known or noun in commands:
            import_module(f"sidecar.cli.{name}").add_to(app)
    for name in _GROUPS:
        if not known or noun == name:
            app.add_typer(import_module(f"sidecar.cli.{name}").app, name=name)


def _hoist(arguments: list[str]) -> list[str]:
    """Move the common options before the noun, where click wants them; everything behind `--` stays.

    `--output` with something else than a form of output is a command's own: a file.
    """
    front: list[str] = []
    rest: list[str] = []
    waiting = iter(arguments)
    for word in waiting:
        if word == "--":
            return [*front, *rest, word, *waiting]
        if word in _COMMON:
            value = next(waiting, None)
            own = word == "--output" and value not in (None, "table", "json")
            (rest if own else front).extend([word] if value is None else [word, value])
        elif word.startswith("--config=") or word in ("--output=table", "--output=json"):
            front.append(word)
        else:
            rest.append(word)
    return front + rest


def main(arguments: list[str] | None = None) -> None:
    """The console script."""
    words = _hoist(sys.argv[1:] if arguments is None else arguments)
    _assemble(words)
    code: int = Exit.DONE

    def call() -> None:
        nonlocal code
        result = app(words, standalone_mode=False)
        code = result if isinstance(result, int) else Exit.DONE

    try:
        failed = guarded(call)
    except typer.Exit as exit_:
        failed = exit_.exit_code
    except TyperException as error:
        if text := (error.format_message() if hasattr(error, "format_message") else str(error)):
            say(f"error: {text}")
        failed = Exit.USAGE
    except typer.Abort:
        failed = Exit.FAILED
    sys.exit(failed or code)
