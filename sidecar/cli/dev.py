"""`sidecar dev`: a Kafka and a Postgres for development and tests, on this machine, in one directory."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from sidecar.core.errors import SidecarError

if TYPE_CHECKING:  # the real import is in the commands: nobody else pays for it
    from sidecar.testing.local_stack import LocalStack

app = typer.Typer(help="A local Kafka and Postgres for development.", no_args_is_help=True)

Directory = Annotated[Path, typer.Option("--dir", help="Where data, logs and state live.", show_default=True)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
DEFAULT = Path(".sidecar-dev")


@app.command()
def up(
    directory: Directory = DEFAULT,
    as_json: AsJson = False,
    fast: Annotated[bool, typer.Option("--fast", help="No fsync: quicker, and not safe against a power cut.")] = False,
) -> None:
    """Start both, or what is missing of them, and say where they are. Called again: the same, at once."""
    from sidecar.testing import local_stack

    with _errors_for_people(), _signals_as_interrupts():
        stack = local_stack.up(directory, progress=_say, fast=fast)
    _print(stack, as_json)


@app.command()
def status(directory: Directory = DEFAULT, as_json: AsJson = False) -> None:
    """Say what runs. Exit code 1 if not both do."""
    from sidecar.testing import local_stack

    with _errors_for_people():
        stack = local_stack.status(directory)
    if stack is None:
        _say(f"no local stack in {directory}; start one: sidecar dev up --dir {directory}")
        raise typer.Exit(1)
    _print(stack, as_json)
    if stack.kafka_pid is None or stack.postgres_pid is None:
        raise typer.Exit(1)


@app.command()
def down(directory: Directory = DEFAULT, wipe: Annotated[bool, typer.Option("--wipe", help="Remove their data and logs too.")] = False) -> None:
    """Stop both. Their data stays for the next `up`, unless `--wipe`."""
    from sidecar.testing import local_stack

    with _errors_for_people():
        local_stack.down(directory, wipe=wipe)


def _print(stack: "LocalStack", as_json: bool) -> None:
    if as_json:
        print(json.dumps(stack.as_json()))
        return
    for name, address, pid in (("Kafka", stack.bootstrap_servers, stack.kafka_pid), ("Postgres", stack.dsn, stack.postgres_pid)):
        print(f"{name:<9} {address or '-':<48} {f'pid {pid}' if pid else 'not running'}")
    if stack.sasl_bootstrap_servers:
        print(f"{'SASL':<9} {stack.sasl_bootstrap_servers:<48} users and passwords: {stack.credentials_file}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _errors_for_people() -> Iterator[None]:
    try:
        yield
    except SidecarError as error:
        _say(f"error: {error}")
        raise typer.Exit(1) from None


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """A `kill` or a closed terminal ends `up` as Ctrl-C does: with nothing half-started left behind."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
