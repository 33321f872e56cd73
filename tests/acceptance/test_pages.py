"""Promise: what docs/ shows to be typed can be typed: every block of these pages is run, on a real broker, database and control plane."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sidecar import ConfigurationError, Library, load, open_library
from sidecar.testing import control_plane as kit
from tests.acceptance.pages import DOCS, blocks, run

README = (DOCS.parent / "README.md").read_text()


@pytest.fixture
async def library(application: Path) -> AsyncIterator[Library]:
    async with open_library(load(application)) as opened:
        with kit.control(application):
            yield opened


async def test_the_library_in_five_minutes(application: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDECAR_CONFIG", str(application))
    await run((DOCS / "library.md").read_text(), application, {"library": library})


async def test_the_readmes_five_minutes_with_ones_own_events(application: Path, library: Library, capfd: pytest.CaptureFixture[str]) -> None:
    """From `Applications publish` on: what stands before it is the fixture's. Names are this test's own, a shred is confirmed, and patience is longer."""
    settings = load(application)
    section = README.partition("\nApplications publish")[2].partition("\n## ")[0]
    for shown, own in {
        "127.0.0.1:PORT": settings.kafka.bootstrap_servers,
        '"users"': f'"{settings.sources[0].topic}"',
        '"users.decrypted"': f'"{settings.views[0].topic}"',
        '"group.id": "app"': f'"group.id": "{settings.deployment}.app"',
        "while (message := consumer.poll(10)) is not None:": "for message in [consumer.poll(60)]:",
        "--wait 10": "--wait 60",
        "sidecar shred": "sidecar shred --yes",
    }.items():
        assert shown in section
        section = section.replace(shown, own)
    (application.parent / "event.json").write_text(json.dumps({"topic": settings.sources[0].topic, "headers": {"ce_tenantid": "acme"}}))
    async with running(application):
        [said] = await run(section, application, {})
    assert capfd.readouterr().out == """b'acme/user-7/1' b'{"email": "jane@example.org"}'\n"""
    assert '"status": "inaccessible"' in said


@asynccontextmanager
async def running(config: Path) -> AsyncIterator[None]:
    """`sidecar run`, ready, for the length of a block."""
    plane = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar", "--config", str(config), "run", "--instance-id", "data-0", stderr=asyncio.subprocess.PIPE
    )
    assert plane.stderr
    try:
        async with asyncio.timeout(60):
            while not (line := await plane.stderr.readline()).startswith(b"ready"):
                assert line, "the data plane ended"
        yield
    finally:
        plane.kill()
        await plane.communicate()


@pytest.mark.usefixtures("library")
async def test_the_readmes_library_in_a_minute(application: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(application.parents[1])
    section = README.partition("## From Python\n")[2].partition("\n## ")[0]
    await run(section, application, {})
    assert capfd.readouterr().out == "1 {'email': 'jane@example.org'}\n"


@pytest.mark.parametrize("page", ["troubleshooting", "policies", "security", "fields"])
async def test_what_other_pages_show_works_too(application: Path, library: Library, page: str) -> None:
    text = (DOCS / f"{page}.md").read_text()
    assert blocks(text)
    await run(text, application, {"library": library})


@pytest.mark.parametrize(
    ("kind", "block", "error"),
    [
        ("python", "assert False", AssertionError),
        ("python", "await nothing()", NameError),
        ("sh", "sidecar policy list --nonsense", AssertionError),
        ("sh", "false; true", AssertionError),
        ("json", "{", ValueError),
        ("yaml", "limits: {max_header: 1}", ConfigurationError),
        ("yaml", "- {class: C, algorithm: ROT13}", ValueError),
        ("", "sidecar status", ValueError),
        ("console", "$ sidecar status", ValueError),
    ],
)
async def test_control_a_block_that_does_not_work_is_noticed(tmp_path: Path, kind: str, block: str, error: type[Exception]) -> None:
    page = f"```text\nseen\n```\n\n```{kind}\n{block}\n```\n"
    assert len(blocks(page)) == 2
    with pytest.raises(error):
        await run(page, tmp_path / "sidecar.yaml", {})
