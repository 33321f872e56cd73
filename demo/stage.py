"""What the demo stands on: steps that are printed and checked, processes that never outlive it, one way out whatever happens."""

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from sidecar.testing import local_stack
from sidecar.testing.local_stack import LocalStack

WIDTH = 66
MADE = ("sidecar.yaml", "keys", "policies.yaml", "receipt.json", "certificate.json", "forged.json", "data-plane.log", "control-plane.log", "demo.log")
"""The files of an earlier run, which a new one removes; nothing else in the directory is touched."""
LOCK = "demo.lock"
HALF_MADE = ("lock", "stack.new", "watcher.log")
"""What the local stack leaves if the signal comes before it wrote down that it exists."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


class Failed(Exception):
    """A check of the demo did not hold."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or a closed terminal. A KeyboardInterrupt, because asyncio swallows any other exception of a signal handler."""


def check(condition: Any, what: str) -> None:
    """`what`: what is wrong, in one line."""
    if not condition:
        raise Failed(what)


class Stage:
    """The demo's directory and every process in it. Use as a context manager: on the way out, on any way out, all of them end."""

    def __init__(self, directory: Path) -> None:
        self.dir = directory
        self.number, self.title = 0, "prepare"
        self.stack: LocalStack | None = None
        self.children: list[subprocess.Popen[bytes]] = []
        self._shielded = self._closing = False
        self._signal = 0
        self._began = self._step_began = time.monotonic()
        self._lock: Any = None
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    # ── steps ──────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """A numbered heading, what the step says, how long it took."""
        self.number, self.title, began = self.number + 1, title, time.monotonic()
        print(f"\n{self.number}  {title}\n   {'-' * (WIDTH - 3)}", flush=True)
        yield
        print(f"   {f'{time.monotonic() - began:.1f} s':>{WIDTH - 3}}", flush=True)

    def say(self, label: str, text: Any = "") -> None:
        print(f"   {label:<14}{text}", flush=True)

    def ok(self, text: str) -> None:
        """What was checked, and held."""
        print(f"   ok  {text}", flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def until(self, condition: Callable[[], Any], seconds: float, what: str) -> Any:
        """The first true answer. The time is a limit, never a measure."""
        deadline = time.monotonic() + seconds
        while not (answer := condition()):
            self.look()
            check(time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}")
            time.sleep(0.02)
        return answer

    def look(self) -> None:
        """In every loop that waits: was there a signal whose exception got lost (in a callback, say)? Did a plane end by itself?"""
        if self._signal:
            raise Interrupted
        for child in self.children:
            if child.poll() is not None:
                raise Failed(f"`{' '.join(map(str, child.args[2:]))}` ended by itself with exit code {child.returncode}")  # type: ignore[index,arg-type]

    # ── processes ──────────────────────────────────────────────────────────────

    def start_stack(self) -> LocalStack:
        self.stack = local_stack.up(self.dir, progress=lambda line: self.say("", line), fast=True, owner_pid=os.getpid())
        return self.stack

    def spawn(self, *arguments: str, log: str) -> subprocess.Popen[bytes]:
        """`sidecar …` in the background; `look` watches it from now on."""
        with self._shield(), (self.dir / log).open("ab") as file:
            child = self._popen(arguments, stdout=file, stderr=file)
            self.children.append(child)
        return child

    def ready(self, child: subprocess.Popen[bytes], log: str, seen: int = 0) -> int:
        """Wait for its line `ready`, the one after the first `seen`; -> how many there were."""
        path = self.dir / log
        self.until(lambda: path.read_text().count("\nready ") + path.read_text().startswith("ready ") > seen, 90, f"{log} says ready")
        return seen + 1

    def sidecar(self, *arguments: str) -> Any:
        """`sidecar … -o json`: what it printed. Fails with its own last line if its exit code is not 0."""
        with self._shield():
            child = self._popen((*arguments, "-o", "json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = child.communicate(timeout=90)
        except BaseException:
            child.kill()
            child.wait()
            raise
        last = (err.decode().strip().splitlines() or ["(it said nothing)"])[0]
        check(child.returncode == 0, f"`sidecar {' '.join(arguments)}` exits with {child.returncode}: {last}")
        return json.loads(out) if out else None

    def exit_code(self, *arguments: str) -> int:
        """Of a command that is expected to refuse."""
        with self._shield():
            child = self._popen((*arguments, "-o", "json"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return child.wait(90)

    def end(self, child: subprocess.Popen[bytes], number: int, seconds: float = 20) -> int:
        """-> its exit code. No zombie is left, and `look` no longer minds it."""
        with self._shield():
            if child in self.children:
                self.children.remove(child)
            child.send_signal(number)
            try:
                return child.wait(seconds)
            except subprocess.TimeoutExpired:
                child.kill()
                return child.wait()

    def _popen(self, arguments: tuple[str, ...], **streams: Any) -> subprocess.Popen[bytes]:
        environment = os.environ | {"SIDECAR_CONFIG": str(self.dir / "sidecar.yaml"), "SIDECAR_HTTP__PORT": "0"}
        command = [sys.executable, "-m", "sidecar", *arguments]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True, preexec_fn=self._die_with_us, **streams)

    def _die_with_us(self) -> None:
        """In the child: if the demo is killed with -9, the kernel ends it too."""
        if self._libc is not None:
            self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    # ── the one way in and out ─────────────────────────────────────────────────

    def __enter__(self) -> "Stage":
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        self.dir.mkdir(parents=True, exist_ok=True)
        self._lock = (self.dir / LOCK).open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            self._lock = None
            raise SystemExit(f"another demo runs in {self.dir}; give this one a --dir of its own") from None
        local_stack.down(self.dir, wipe=True)
        self.dir.mkdir(parents=True, exist_ok=True)
        self._remove_made()
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> bool:
        self._closing = self._shielded = True
        for number in SIGNALS:  # a second Ctrl-C changes nothing: we are on our way, and quick
            signal.signal(number, signal.SIG_IGN)
        if isinstance(error, KeyboardInterrupt) or (error is not None and self._signal):
            self._give_up(f"interrupted at step {self.number} ({self.title}): everything is stopped and removed", keep_logs=False)
            sys.exit(128 + (self._signal or signal.SIGINT))
        if isinstance(error, Exception):
            with (self.dir / "demo.log").open("a") as log:
                traceback.print_exception(error, file=log)
            what = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            self._give_up(f"demo failed at step {self.number} ({self.title}): {what} [logs: {self.dir}]", keep_logs=True)
            sys.exit(1)
        for child in list(self.children):
            self.end(child, signal.SIGTERM)
        local_stack.down(self.dir)
        return False

    def _give_up(self, line: str, *, keep_logs: bool) -> None:
        for child in list(self.children):
            self.end(child, signal.SIGKILL)
        local_stack.down(self.dir, wipe=True, keep_logs=keep_logs)
        if not keep_logs:
            self._remove_made()
            for name in (LOCK, *HALF_MADE):
                (self.dir / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.dir.rmdir()
        sys.stdout.flush()
        print(f"\n{line}", file=sys.stderr, flush=True)

    def _remove_made(self) -> None:
        for path in (self.dir / name for name in MADE):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number
        if not self._shielded:
            raise Interrupted

    @contextlib.contextmanager
    def _shield(self) -> Iterator[None]:
        """A signal waits until the child that is being made, or ended, is on our list, or off it."""
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = self._closing
        if self._signal and not self._closing:
            raise Interrupted
