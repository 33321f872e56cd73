"""`make demo`, the newcomer's first minute: it shows every step, it notices a broken promise, and it leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sidecar.testing import local_stack

ROOT = Path(__file__).resolve().parents[2]
STEPS = (
    "1  start broker and database, data plane and control plane",
    "2  publish 600 events of two tenants and three classes",
    "3  one event three ways",
    "4  events per second, and what encryption costs",
    "5  rotate the key of the stream acme/user-0",
    "6  shred the tenant acme",
    "7  kill -9 the data plane in mid-stream, and restart it",
    "8  where the receipt lies, and what to try next",
)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the demo works; whatever a test left running there is gone at the end."""
    path = tmp_path / "demo"
    yield path
    local_stack.down(path, wipe=True)


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, str(ROOT / "demo" / "main.py"), "--small", "--dir", str(folder), *options]


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *options), cwd=folder.parent, capture_output=True, text=True, timeout=280)


def processes(folder: Path) -> list[str]:
    """Those that name the folder, in their command line or as their configuration."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if any(str(folder) in word for word in [*words, process.environ().get("SIDECAR_CONFIG", "")]):
                found.append(" ".join(words))
        except psutil.Error:
            continue
    return found


def none_is_left(folder: Path) -> None:
    """The stack's watcher looks once a second whether the demo is still there, so the last process may end a moment later."""
    deadline = time.monotonic() + 60
    while left := processes(folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_demo_shows_eight_steps_that_hold_and_its_three_commands_work_afterwards(folder: Path) -> None:
    done = run(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line[:1].isdigit()] == list(STEPS)
    assert sum(line.startswith("   ok  ") for line in lines) == 12
    assert lines[-1].startswith("all 8 steps hold, in ")
    assert processes(folder) == []
    commands = [line.removeprefix("   $ ") for line in lines if line.startswith("   $ ")]
    assert len(commands) == 3
    shown = [subprocess.run(each, shell=True, cwd=folder.parent, capture_output=True, text=True, timeout=120) for each in commands]
    assert [each.returncode for each in shown] == [0, 0, 0], [each.stderr for each in shown]
    assert '"status": "inaccessible"' in shown[1].stdout
    kept, now = json.loads((folder / "receipt.json").read_text()), json.loads(shown[1].stdout)
    assert kept.pop("residue") and now.pop("residue")  # it goes on behind the receipt
    assert now == kept
    assert shown[2].stdout.count('"status": "erased"') == 5


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        ("plaintext", "demo failed at step 6 (shred the tenant acme): the scan finds sensitive text of acme"),
        ("lost", "demo failed at step 7 (kill -9 the data plane in mid-stream, and restart it): 1 of "),
        ("twice", "demo failed at step 7 (kill -9 the data plane in mid-stream, and restart it): 1 events are twice in the view"),
    ],
)
def test_demo_fails_with_one_clear_line_when_a_promise_is_broken(folder: Path, broken: str, line: str) -> None:
    done = run(folder, "--break", broken)
    assert done.returncode == 1, done.stdout + done.stderr
    said = done.stderr.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith(line)
    assert "all 8 steps hold" not in done.stdout
    assert processes(folder) == []


@pytest.mark.parametrize("moment", ["starting Kafka", "1  start", "both planes say", "5  rotate", "7  kill"])
def test_ctrl_c_leaves_no_process_and_no_file_behind(folder: Path, moment: str) -> None:
    demo = subprocess.Popen(command(folder), cwd=folder.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert demo.stdout is not None and demo.stderr is not None
    with demo:
        assert any(moment in line for line in demo.stdout), f"the demo never said {moment!r}"
        demo.send_signal(signal.SIGINT)
        _, said = demo.communicate(timeout=120)
    assert demo.returncode == 130
    assert said.strip().startswith("interrupted at step ")
    none_is_left(folder)
    assert not folder.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_demo_that_is_killed_takes_everything_with_it(folder: Path) -> None:
    demo = subprocess.Popen(command(folder), cwd=folder.parent, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert demo.stdout is not None
    with demo:
        assert any("both planes say" in line for line in demo.stdout)
        os.kill(demo.pid, signal.SIGKILL)
    none_is_left(folder)
