"""Servers of the local stack as plain detached processes: start, recognise, stop; free ports; the tail of a log.

A pid alone proves nothing (the kernel hands it out again), so a process is ours only if its command line names a path inside the stack's directory.
"""

import contextlib
import fcntl
import os
import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from sidecar.core.errors import SidecarError

Progress = Callable[[str], None]

_BELOW_EPHEMERAL = range(15_000, 32_000)
_START_MARK = "--- sidecar dev: start "


class LocalStackError(SidecarError):
    """The local broker or database could not be started, found or stopped."""


class PortClashError(LocalStackError):
    """A port that was free a moment ago is taken: worth another attempt on other ports."""


def free_ports(count: int, *, wanted: Sequence[int] = (), move: bool = True) -> list[int]:
    """Ports on 127.0.0.1: those in `wanted` if all of them are free, else `count` distinct others; without `move` that is an error instead.

    The others lie below the range from which kernels take the ports of outgoing connections. From within it a client could be given the port of a
    server that is just being restarted, or connect to itself. They are free now and may be taken right after: callers retry on `PortClashError`.
    """
    taken = [port for port in wanted if port > 0 and not _is_free(port)]
    if len(wanted) == count and 0 not in wanted and not taken:
        return list(wanted)
    if not move:
        raise LocalStackError(f"port {', '.join(map(str, taken))} of 127.0.0.1 was taken by another program. Stop that, or let `up` move on")
    found: list[int] = []
    for port in random.SystemRandom().sample(_BELOW_EPHEMERAL, 500):
        if _is_free(port):
            found.append(port)
        if len(found) == count:
            return found
    raise LocalStackError(f"no {count} free ports on 127.0.0.1 between {_BELOW_EPHEMERAL[0]} and {_BELOW_EPHEMERAL[-1]}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the server's last life linger in TIME_WAIT
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()  # bind alone succeeds beside another listener that allows reuse
        except OSError:
            return False
    return True


def answers(port: int) -> bool:
    """Whether something accepts connections on that port of 127.0.0.1."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=0.5):
            return True
    except OSError:
        return False


def spawn(command: Sequence[str], *, log: Path, cwd: Path, env: Mapping[str, str] | None = None) -> int:
    """Start a server that outlives us: a session of its own (our Ctrl-C does not reach it), output appended to `log`. Returns its pid."""
    with log.open("ab") as output:
        output.write(f"{_START_MARK}{time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n".encode())
        output.flush()
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=cwd, env=env, start_new_session=True
        )
    process.returncode = 0  # handed over: without this, a warning at exit about a child that still runs
    return process.pid


def find(program: str, argument: str, pid: int | None = None) -> int | None:
    """The pid of the running `program` that was started with `argument`: `pid` if that is it, else the one found among all processes."""
    if pid is not None and _is(pid, program, argument):
        return pid
    return next((int(each) for each in psutil.pids() if _is(each, program, argument)), None)


def _is(pid: int, program: str, argument: str) -> bool:
    try:
        process = psutil.Process(pid)
        command = process.cmdline()
        return bool(command) and Path(command[0]).name == program and argument in command and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def alive(pid: int) -> bool:
    """Whether the process runs. If it is a child of ours that has ended, it is reaped here, so that no zombie stays."""
    with contextlib.suppress(ChildProcessError):
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            return False
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def stop(pid: int, *, signal_number: int, grace_seconds: float) -> None:
    """Ask the process to end; after the grace, kill it and its children. Returns when all of them are gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal_number)
    if not _gone(pid, grace_seconds):
        kill(pid)


def kill(pid: int) -> None:
    """SIGKILL to the process and everything below it, as a power cut would. Returns when all of them are gone."""
    try:
        process = psutil.Process(pid)
        victims = [process, *process.children(recursive=True)]
    except psutil.Error:
        return
    for victim in victims:
        with contextlib.suppress(psutil.Error):
            victim.kill()
    for victim in victims:
        if not _gone(victim.pid, 10):
            raise LocalStackError(f"process {victim.pid} does not end after SIGKILL; it may hang in the kernel (a dead disk or network mount?)")


def _gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def wait_until(ready: Callable[[], bool], *, pid: int, what: str, log: Path, seconds: float) -> None:
    """Returns once `ready()`; if the process ends or time is up before that, raises with the last lines of its log."""
    deadline = time.monotonic() + seconds
    while not ready():
        if not alive(pid):
            raise _failed(f"{what} ended while starting", log)
        if time.monotonic() > deadline:
            raise _failed(f"{what} did not answer within {seconds:.0f} s", log)
        time.sleep(0.05)


def _failed(what: str, log: Path) -> LocalStackError:
    lines = tail(log)
    clash = any(sign in lines for sign in ("Address already in use", "could not bind"))
    kind = PortClashError if clash else LocalStackError
    return kind(f"{what}. The last lines of {log}:\n{lines}")


def tail(log: Path, lines: int = 15) -> str:
    """The last lines that were logged since the last start, indented, for a message to people."""
    text = log.read_text(errors="replace") if log.exists() else ""
    latest = text.rpartition(_START_MARK)[2].splitlines()[1:]
    return "\n".join("  " + line for line in latest[-lines:]) or "  (nothing was logged)"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time, across processes; released by the kernel if the holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
