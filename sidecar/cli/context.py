"""What every command shares: where the configuration is, how to print, how an error becomes one line and an exit code."""

import asyncio
import getpass
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar
from uuid import UUID

import orjson
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sidecar import settings as settings_module
from sidecar.core.errors import AccessDenied, ConfigurationError, SidecarError
from sidecar.postgres.connection import Connection, connected
from sidecar.settings import Settings

T = TypeVar("T")


class Exit(IntEnum):
    """As in messages.md."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    DENIED = 3
    PENDING = 4


@dataclass
class Cli:
    """The object behind `typer.Context.obj`: options before the noun, settings read when a command first needs them."""

    config: Path | None = None
    output: str | None = None

    @cached_property
    def settings(self) -> Settings:
        return settings_module.load(self.config)

    @property
    def as_json(self) -> bool:
        """JSON when asked for, or when nobody looks at a terminal."""
        return self.output == "json" or (self.output is None and not sys.stdout.isatty())

    def ask(self, role: Literal["control", "reader", "migrator"], query: Callable[[Connection], Awaitable[T]]) -> T:
        """The answer of the database, on a connection of its own as this role. Raises what `query` raises, and Unavailable."""

        async def main() -> T:
            async with connected(self.settings.postgres.for_role(role), application_name="sidecar cli") as connection:
                return await query(connection)

        return run_async(main())

    def show(self, data: Any, columns: Sequence[str] | None = None) -> None:
        """An array of objects or one object: as JSON on stdout alone, or as a table for people."""
        if self.as_json:
            sys.stdout.write(orjson.dumps(data, default=_plain, option=orjson.OPT_INDENT_2).decode() + "\n")
            return
        console = Console()
        if isinstance(data, dict):
            table = Table(show_header=False, box=None)
            for name, value in data.items():
                table.add_row(f"[bold]{escape(str(name))}[/bold]", _cell(value))
        else:
            names = list(columns or (data[0] if data else ()))
            table = Table(*names, box=None, header_style="bold")
            for row in data:
                table.add_row(*(_cell(row.get(name)) for name in names))
            if not data:
                say("nothing")
                return
        console.print(table)


def cli(context: typer.Context) -> Cli:
    """From any subcommand."""
    found: Cli = context.find_root().obj
    return found


def show_line(data: Any) -> None:
    """One JSON object on a line of its own, at once: for streams of output."""
    sys.stdout.write(orjson.dumps(data, default=_plain).decode() + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """Progress and remarks, on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def who() -> str:
    """Who asks, where nobody says."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def run_async(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(main)


def fail(text: str, code: Exit = Exit.FAILED) -> NoReturn:
    """Say so, and end the command with that exit code."""
    say(text)
    raise typer.Exit(int(code))


def guarded(call: Callable[[], None]) -> int:
    """Run the application; a product error becomes its message and an exit code, Ctrl-C a quiet 130."""
    try:
        call()
    except ConfigurationError as error:
        say(f"error: {error}")
        return Exit.USAGE
    except AccessDenied as error:
        say(f"error: {error}")
        return Exit.DENIED
    except SidecarError as error:
        say(f"error: {error}")
        return Exit.FAILED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        with suppress(OSError):
            sys.stdout.close()
        return Exit.DONE
    return Exit.DONE


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if isinstance(value, UUID | Path):
        return str(value)
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(type(value).__name__)


def _cell(value: Any) -> str:
    """As it is: what looks like markup of the table's is the value's own."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="seconds")
    return escape(orjson.dumps(value, default=_plain).decode() if isinstance(value, bytes | dict | list) else str(value))
