"""A Kafka and a Postgres on free ports of 127.0.0.1, detached, all their files in one directory. `sidecar dev`, the demo and the tests share it.

    stack = up(Path(".sidecar-dev"))        # again: the same, at once
    stack.bootstrap_servers, stack.dsn
    down(stack.dir)

What runs is remembered in `stack.json` there, and believed only if the pid is still that program with that directory and the port answers. After a
kill or a reboot, `up` starts what is missing on the same data, and on the same ports unless somebody took them. All functions are synchronous, hold a
lock on the directory while they work, and raise `LocalStackError`.
"""

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sidecar.testing import local_kafka, local_postgres, local_process
from sidecar.testing.local_kafka import KafkaPorts
from sidecar.testing.local_process import LocalStackError, PortClashError, Progress

__all__ = [
    "LocalStack",
    "LocalStackError",
    "down",
    "kill_kafka",
    "kill_postgres",
    "start_kafka",
    "start_postgres",
    "status",
    "stop_kafka",
    "stop_postgres",
    "up",
]

_ATTEMPTS = 4
_WATCH = 'while kill -0 "$1" 2>/dev/null; do sleep 1; done; exec "$2" -m sidecar.testing.local_stack down "$3" --wipe'


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalStack:
    """Where the servers are. An address is empty if that server was never started here; a pid is None if it does not run (or is not ours)."""

    dir: Path
    bootstrap_servers: str = ""
    sasl_bootstrap_servers: str = ""
    dsn: str = ""
    kafka_pid: int | None = None
    postgres_pid: int | None = None
    credentials_file: Path | None = None

    def credentials(self) -> dict[str, str]:
        """SCRAM-SHA-256 passwords by user: `sidecar` (super user) and `reader` (what ACLs give it)."""
        if self.credentials_file is None:
            return {}
        passwords: dict[str, str] = json.loads(self.credentials_file.read_text())
        return passwords

    def as_json(self) -> dict[str, dict[str, Any]]:
        """The contract's object, with more keys."""
        kafka = {
            "bootstrap_servers": self.bootstrap_servers,
            "sasl_bootstrap_servers": self.sasl_bootstrap_servers,
            "sasl_mechanism": local_kafka.MECHANISM,
            "credentials_file": str(self.credentials_file) if self.credentials_file else None,
            "pid": self.kafka_pid,
        }
        return {"kafka": kafka, "postgres": {"dsn": self.dsn, "pid": self.postgres_pid}}


@dataclass(slots=True, kw_only=True)
class _State:
    """What stack.json holds. A port is 0 until the server was started once."""

    fast: bool = False
    kafka_pid: int | None = None
    kafka_ports: list[int] = field(default_factory=lambda: [0, 0, 0])
    postgres_pid: int | None = None
    postgres_port: int = 0
    watcher_pid: int | None = None

    @property
    def ports(self) -> KafkaPorts:
        plain, sasl, controller = self.kafka_ports
        return KafkaPorts(plain=plain, sasl=sasl, controller=controller)


def up(
    directory: Path | str,
    *,
    progress: Progress = lambda _line: None,
    fast: bool = False,
    kafka: bool = True,
    postgres: bool = True,
    owner_pid: int | None = None,
) -> LocalStack:
    """Start what does not run yet, and return when it serves. If that fails or is interrupted, what this call started is killed.

    `fast` turns fsync off: a killed process loses nothing by that, a machine without power does. With `owner_pid` the stack goes down, with its data,
    within about a second after that process is gone, however it went.
    """
    path = _resolved(directory)
    with _working_on(path, create=True) as state, _killing_what_was_started(path, state):
        state.fast = fast if state.postgres_port == 0 else state.fast
        if owner_pid is not None:  # before the first server: a kill -9 while they start leaves none either
            _watch(path, state, owner_pid)
            _save(path, state)
        todo = [server for server, wanted in ((_Kafka(path, state, progress), kafka), (_Postgres(path, state, progress), postgres)) if wanted]
        todo = [server for server in todo if not server.serves()]
        for server in todo:  # all are begun before the first is waited for: they start side by side
            server.begin()
        for server in reversed(todo):
            server.finish()
        return _describe(path, state)


def status(directory: Path | str) -> LocalStack | None:
    """What runs there now; None if there never was a stack."""
    path = _resolved(directory)
    if not _state_file(path).exists():
        return None
    with _working_on(path) as state:
        return _describe(path, state)


def down(directory: Path | str, *, wipe: bool = False, keep_logs: bool = False) -> None:
    """Stop both, if they run. `wipe` kills them and removes their data and logs (and nothing else: the directory goes only if it is empty then)."""
    path = _resolved(directory)
    if not _state_file(path).exists():
        return
    with _working_on(path) as state:
        _end_watcher(path, state)
        for pid, stop in ((_kafka_pid(path, state), local_kafka.stop), (_postgres_pid(path, state), local_postgres.stop)):
            if pid is not None:
                (local_process.kill if wipe else stop)(pid)
        state.kafka_pid = state.postgres_pid = None
    if wipe:
        _wipe(path, keep_logs=keep_logs)


def kill_kafka(directory: Path | str) -> None:
    """SIGKILL, as the out-of-memory killer would."""
    _end(directory, _kafka_pid, local_process.kill)


def kill_postgres(directory: Path | str) -> None:
    """SIGKILL to the server and all its backends."""
    _end(directory, _postgres_pid, local_process.kill)


def stop_kafka(directory: Path | str) -> None:
    """An orderly end of the broker alone."""
    _end(directory, _kafka_pid, local_kafka.stop)


def stop_postgres(directory: Path | str) -> None:
    """An orderly end of the database alone; its sessions are cut."""
    _end(directory, _postgres_pid, local_postgres.stop)


def start_kafka(directory: Path | str, *, progress: Progress = lambda _line: None) -> LocalStack:
    """Start the broker again on its data and its ports; raises if somebody took them. Nothing if it runs."""
    path = _resolved(directory)
    with _working_on(path) as state, _killing_what_was_started(path, state):
        _restart(_Kafka(path, state, progress, move=False))
        return _describe(path, state)


def start_postgres(directory: Path | str, *, progress: Progress = lambda _line: None) -> LocalStack:
    """Start the database again on its data and its port; raises if somebody took it. Nothing if it runs."""
    path = _resolved(directory)
    with _working_on(path) as state, _killing_what_was_started(path, state):
        _restart(_Postgres(path, state, progress, move=False))
        return _describe(path, state)


def _restart(server: "_Server") -> None:
    if not server.serves():
        server.begin()
        server.finish()


class _Server:
    """One of the two. `begin` returns as soon as the process exists, `finish` when it serves."""

    name: str

    def __init__(self, path: Path, state: _State, progress: Progress, *, move: bool = True) -> None:
        """`move`: to other ports if somebody took its own."""
        self.path, self.state, self.progress, self.move = path, state, progress, move

    def serves(self) -> bool:
        raise NotImplementedError

    def begin(self) -> None:
        raise NotImplementedError

    def wait(self) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self.wait()
                self.progress(f"{self.name} is up")
                return
            except PortClashError:
                if not self.move or attempt == _ATTEMPTS:
                    raise
                self.progress(f"{self.name}: a port was taken meanwhile, trying others")
                self.begin()


class _Kafka(_Server):
    name = "Kafka"

    def serves(self) -> bool:
        self.state.kafka_pid = _kafka_pid(self.path, self.state)
        return self.state.kafka_pid is not None and local_process.answers(self.state.ports.plain)

    def begin(self) -> None:
        self.progress("starting Kafka")
        _each(_kafka_pid(self.path, self.state), local_process.kill)  # one that runs but does not answer
        self.state.kafka_ports = local_process.free_ports(3, wanted=self.state.kafka_ports, move=self.move)
        local_kafka.write_configuration(self.path, self.state.ports)
        local_kafka.initialise(self.path, self.progress)
        self.state.kafka_pid = local_kafka.spawn(self.path, self.progress)
        _save(self.path, self.state)

    def wait(self) -> None:
        local_kafka.wait_ready(self.path, self.state.kafka_pid or 0, self.state.ports)


class _Postgres(_Server):
    name = "Postgres"

    def serves(self) -> bool:
        self.state.postgres_pid = _postgres_pid(self.path, self.state)
        return self.state.postgres_pid is not None and local_process.answers(self.state.postgres_port)

    def begin(self) -> None:
        self.progress("starting Postgres")
        _each(_postgres_pid(self.path, self.state), local_process.kill)
        (self.state.postgres_port,) = local_process.free_ports(1, wanted=[self.state.postgres_port], move=self.move)
        local_postgres.initialise(self.path, fast=self.state.fast)
        self.state.postgres_pid = local_postgres.spawn(self.path, self.state.postgres_port, fast=self.state.fast)
        _save(self.path, self.state)

    def wait(self) -> None:
        local_postgres.wait_ready(self.path, self.state.postgres_pid or 0, self.state.postgres_port)


def _resolved(directory: Path | str) -> Path:
    """Symbolic links followed: the path must be the same in every command line that we later look for."""
    return Path(directory).expanduser().resolve()


def _state_file(path: Path) -> Path:
    return path / "stack.json"


@contextlib.contextmanager
def _working_on(path: Path, *, create: bool = False) -> Iterator[_State]:
    """The directory's state, alone with it; written back also after an error."""
    if create:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LocalStackError(f"cannot use {path} for the local stack: {error.strerror}") from error
    elif not _state_file(path).exists():
        raise LocalStackError(f"there is no local stack in {path}. Start one: sidecar dev up --dir {path}")
    with local_process.locked(path / "lock"):
        state = _load(_state_file(path)) if _state_file(path).exists() else _State()
        try:
            yield state
        finally:
            _save(path, state)


def _load(file: Path) -> _State:
    try:
        return _State(**json.loads(file.read_text()))
    except (ValueError, TypeError):
        raise LocalStackError(f"{file} is not what `sidecar dev up` wrote. Remove its directory, or use another --dir") from None


def _save(path: Path, state: _State) -> None:
    fresh = _state_file(path).with_suffix(".new")
    fresh.write_text(json.dumps(asdict(state)))
    fresh.replace(_state_file(path))


def _kafka_pid(path: Path, state: _State) -> int | None:
    return local_kafka.find(path, state.kafka_pid)


def _postgres_pid(path: Path, state: _State) -> int | None:
    return local_postgres.find(path, state.postgres_pid)


def _each(pid: int | None, act: Callable[[int], None]) -> None:
    if pid is not None:
        act(pid)


def _end(directory: Path | str, find: Callable[[Path, _State], int | None], act: Callable[[int], None]) -> None:
    path = _resolved(directory)
    with _working_on(path) as state:
        _each(find(path, state), act)


def _describe(path: Path, state: _State) -> LocalStack:
    credentials = local_kafka.credentials_file(path)
    return LocalStack(
        dir=path,
        bootstrap_servers=f"127.0.0.1:{state.ports.plain}" if state.ports.plain else "",
        sasl_bootstrap_servers=f"127.0.0.1:{state.ports.sasl}" if state.ports.sasl else "",
        dsn=local_postgres.dsn(state.postgres_port) if state.postgres_port else "",
        kafka_pid=_kafka_pid(path, state) if state.ports.plain else None,
        postgres_pid=_postgres_pid(path, state) if state.postgres_port else None,
        credentials_file=credentials if credentials.exists() else None,
    )


@contextlib.contextmanager
def _killing_what_was_started(path: Path, state: _State) -> Iterator[None]:
    """On any way out but the good one (Ctrl-C above all), the servers that did not run before are killed. The search also finds one whose pid
    was not noted yet."""
    before = {_kafka_pid(path, state), _postgres_pid(path, state)}
    try:
        yield
    except BaseException:
        for pid in {_kafka_pid(path, state), _postgres_pid(path, state)} - before:
            _each(pid, local_process.kill)
        raise


def _watch(path: Path, state: _State, owner_pid: int) -> None:
    if state.watcher_pid is None or local_process.find("sh", str(path), state.watcher_pid) is None:
        command = ["/bin/sh", "-c", _WATCH, "sidecar-watcher", str(owner_pid), sys.executable, str(path)]
        state.watcher_pid = local_process.spawn(command, log=path / "watcher.log", cwd=Path("/"))


def _end_watcher(path: Path, state: _State) -> None:
    if state.watcher_pid is not None:  # if it is the watcher that called us it is no `sh` any more, and not found
        _each(local_process.find("sh", str(path), state.watcher_pid), local_process.kill)
        state.watcher_pid = None


def _wipe(path: Path, *, keep_logs: bool) -> None:
    for name in ("kafka", "postgres", "postgres.new"):
        shutil.rmtree(path / name, ignore_errors=True)
    for name in ("kafka-credentials.json", "stack.json", "stack.new", "lock", *(() if keep_logs else ("kafka.log", "postgres.log", "watcher.log"))):
        (path / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.rmdir()


def _main(arguments: list[str]) -> int:
    """`python -m sidecar.testing.local_stack down DIR [--wipe]`: for the watcher and `make clean`, where the command line may be broken or gone."""
    if len(arguments) < 2 or arguments[0] != "down":
        print(_main.__doc__, file=sys.stderr)
        return 2
    down(arguments[1], wipe="--wipe" in arguments[2:])
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
