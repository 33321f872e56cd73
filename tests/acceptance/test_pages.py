"""Promise: what docs/ shows to be typed can be typed: every block of these pages is run, on a real broker, database and control plane."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sidecar import ConfigurationError, Library, NewEvent, PolicySpec, load, open_library
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


async def test_the_readmes_way_to_be_forgotten_and_to_show_it(application: Path, library: Library) -> None:
    """A person's events first, then every line as it stands there."""
    by_person = PolicySpec.model_validate({"class": "Person", "key_scope": "subject"})
    await library.policies.create_policy(by_person, actor="a test", reason="the page needs a person's key")
    await library.store.append_to_stream("s", [NewEvent(type="T", data="x", subject="jane")], tenant="acme", stream_class="Person")
    section = README.partition("## Being forgotten, and showing it\n")[2].partition("\n## ")[0]
    [(kind, block)] = blocks(section)
    for shown, own in {"--wait 10": "--wait 60", 'request" ': 'request" --yes ', '"case 7"': '"case 7" --wait 60', '"closed"': '"closed" --wait 60',
                       '"a customer again"': '"a customer again" --wait 60'}.items():  # fmt: skip
        assert shown in block
        block = block.replace(shown, own)
    shred, get, shown = block.partition("sidecar receipts get COMMAND")
    [said] = await run(f"```{kind}\n{shred}```\n", application, {})
    assert [receipt["status"] for receipt in receipts(said)] == ["done", "inaccessible"]
    command = receipts(said)[1]["command_id"]
    [said] = await run(f"```{kind}\n{get}{shown}```\n".replace("COMMAND", command), application, {})
    assert [receipt["status"] for receipt in receipts(said) if receipt.get("op") in ("hold", "release", "readmit")] == ["done"] * 3
    assert "jane" not in (application.parent / "certificate.json").read_text()
    assert "acme" in (application.parent / "report.html").read_text()


def receipts(said: str) -> list[dict[str, Any]]:
    """Every JSON object that commands wrote, one behind the other; of a list its members."""
    found, at, decoder = [], 0, json.JSONDecoder()
    while (at := said.find("{", at)) >= 0:
        receipt, at = decoder.raw_decode(said, at)
        found.append(receipt)
    return found


@asynccontextmanager
async def running(config: Path) -> AsyncIterator[None]:
    """`sidecar run`, ready, for the length of a block."""
    plane = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar", "--config", str(config), "run", "--instance-id", "data-0", stderr=asyncio.subprocess.PIPE
    )
    assert plane.stderr
    try:
        async with asyncio.timeout(120):
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
