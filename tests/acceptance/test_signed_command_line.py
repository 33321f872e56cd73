"""From `sidecar init` on every command is signed: keys, approvals, holds, and exit codes as a user meets them."""

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar.core.command import PAYLOAD_TYPE
from sidecar.settings import load
from sidecar.testing import control_plane as kit
from sidecar.testing.local_stack import LocalStack
from tests.acceptance.world import blocking, connect, migrations

ROOT = Path(__file__).resolve().parents[2]


class User:
    """Somebody with a shell, in the folder that `sidecar init` made."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, folder / "sidecar.yaml"

    def run(self, *words: str, key: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = dict(os.environ) | {"SIDECAR_CONFIG": str(self.config)} | ({"SIDECAR_ISSUER_KEY": str(self.folder / key)} if key else {})
        command = [sys.executable, "-m", "sidecar", *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=self.folder, stdin=subprocess.DEVNULL, check=False)

    def json(self, *words: str, code: int = 0, key: str | None = None) -> Any:
        done = self.run("-o", "json", *words, key=key)
        assert done.returncode == code, f"{words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout)

    def refused(self, *words: str, key: str | None = None) -> str:
        """The code of a command that is not allowed: exit 3."""
        code: str = self.json(*words, "--wait", "100", code=3, key=key)["error"]["code"]
        return code


@pytest.fixture
def user(local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]) -> User:
    """Behind `sidecar init` and `sidecar issuer keygen`: three more keys, two of them listed. A shred needs two issuers."""
    user = User(tmp_path / "app")
    init = [sys.executable, "-m", "sidecar", "init", str(user.folder), "--bootstrap-servers", local_stack.bootstrap_servers, "--dsn", database]
    subprocess.run(init, check=True, capture_output=True)
    document, name = yaml.safe_load(user.config.read_text()), unique("s")
    topics = {part: f"{name}.{part}" for part in ("topic", "receipts", "ledger")}
    document["deployment"] = name
    document["control"] |= topics | {"approvals": {"shred": 2}}
    document["http"]["port"] = 0
    for issuer, limits in (("dpo", {"tenants": ["acme"]}), ("rotator", {"ops": ["rotate"]}), ("stranger", None)):
        made = user.run("issuer", "keygen", f"keys/{issuer}", "-o", "json")
        snippet = yaml.safe_load(made.stderr)["control"]["issuers"][0]
        assert snippet["public_key"] == json.loads(made.stdout)["public_key"]
        if limits is not None:
            document["control"]["issuers"].append(snippet | limits)
    user.config.write_text(yaml.safe_dump(document))

    async def seed() -> None:
        connection = await connect(database)
        await migrations.migrate(connection)
        for tenant in ("acme", "zeta"):
            await kit.seed(connection, tenant, {"a": "C", "b": "D"})
        await connection.close()

    blocking(seed)
    return user


@pytest.fixture
def served(user: User) -> Iterator[User]:
    with kit.control(user.config):
        yield user


def test_init_makes_keys_that_only_their_owner_may_read_and_an_own_issuer(user: User) -> None:
    control = load(user.config).control
    for key in (control.issuer_key, control.signing_key, user.folder / "keys" / "dpo"):
        assert key is not None
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert "PRIVATE" not in key.with_name(f"{key.name}.pub").read_text()
    assert (control.allow_unsigned, control.issuers[0].name) == (False, "developer")
    again = user.run("issuer", "keygen", "keys/dpo")
    assert (again.returncode, "is there already" in again.stderr) == (2, True)
    shown = user.json("issuer", "show", "keys/dpo.pub")
    assert shown["public_key"] == control.issuers[1].public_key


def test_who_may_command_what_and_with_whose_approval(served: User) -> None:
    user = served
    rotated = user.json("rotate", "--tenant", "acme", "--reason", "r", "--wait", "100")
    assert (rotated["status"], rotated["keys"]["count"]) == ("done", 2)
    assert user.json("rotate", "--tenant", "zeta", "--reason", "r", "--key", "keys/rotator", "--wait", "100")["status"] == "done"
    assert user.refused("rotate", "--tenant", "acme", "--reason", "r", key="keys/stranger") == "unknown_issuer"
    assert user.refused("rotate", "--tenant", "zeta", "--reason", "r", key="keys/dpo") == "not_permitted"
    assert user.refused("hold", "--tenant", "acme", "--reason", "r", key="keys/rotator") == "not_permitted"
    assert user.refused("shred", "--tenant", "acme", "--reason", "r", "--yes") == "approvals_missing"

    prepared = user.json("shred", "--tenant", "acme", "--reason", "Art. 17", "--yes", "--out", "request.json")
    assert user.json("command", "show", "request.json")["verdict"]["code"] == "approvals_missing"
    assert user.refused("command", "send", "request.json") == "approvals_missing"
    user.json("command", "sign", "request.json", "--key", "keys/rotator")
    assert user.refused("command", "send", "request.json") == "approvals_missing", "a rotator's voice counts for no shred"
    signed = user.json("command", "sign", "request.json", key="keys/dpo")
    assert len(signed["signatures"]) == 3
    shown = user.json("command", "show", "request.json")
    assert (shown["verdict"], [s["issuer"] for s in shown["signatures"]]) == (None, ["developer", "rotator", "dpo"])
    receipt = user.json("command", "send", "request.json", "--wait", "100")
    assert (receipt["status"], receipt["command_id"]) == ("inaccessible", prepared["command_id"])
    again = user.json("command", "send", "request.json", "--wait", "100")
    assert again["receipt_id"] == receipt["receipt_id"]


def test_an_altered_file_is_refused(served: User) -> None:
    user = served
    user.json("rotate", "--tenant", "acme", "--reason", "r", "--out", "request.json")
    file = user.folder / "request.json"
    document = json.loads(file.read_text())
    flipped = document["signatures"][0]["sig"]
    document["signatures"][0]["sig"] = ("B" if flipped[0] == "A" else "A") + flipped[1:]
    file.write_text(json.dumps(document))
    assert user.refused("command", "send", "request.json") == "bad_signature"


def test_a_hold_is_placed_listed_and_released(served: User) -> None:
    user = served
    placed = user.json("hold", "--tenant", "acme", "--stream", "a", "--reason", "Case 7/26", "--wait", "100")
    assert placed["status"] == "done"
    (held,) = user.json("holds", "list")
    assert (held["hold_id"], held["tenant_id"], held["scope_kind"], held["scope_id"], held["reason"]) == (
        placed["holds"][0],
        "acme",
        "stream",
        "a",
        "Case 7/26",
    )
    user.json("shred", "--tenant", "acme", "--reason", "Art. 17", "--yes", "--out", "request.json")
    user.json("command", "sign", "request.json", key="keys/dpo")
    refused = user.run("-o", "json", "command", "send", "request.json", "--wait", "100")
    assert (refused.returncode, json.loads(refused.stdout)["error"]["code"]) == (3, "legal_hold")
    assert "Case 7/26" in refused.stderr
    released = user.json("release", "--hold", held["hold_id"], "--reason", "case closed", "--wait", "100")
    assert released["holds"] == placed["holds"]
    assert user.json("holds", "list") == []
    (ended,) = user.json("holds", "list", "--released", "--tenant", "acme")
    assert ended["released_by"] == released_by(ended)
    user.json("release", "--tenant", "acme", "--stream", "a", "--reason", "again", "--wait", "100", code=1)
    assert user.run("release", "--hold", held["hold_id"], "--reason", "again").returncode == 1


def released_by(hold: dict[str, Any]) -> str:
    """Whoever placed it: it is the same user here."""
    return str(hold["placed_by"])


@pytest.mark.parametrize(
    "words",
    [
        ("shred", "--tenant", "acme", "--reason", "r", "--yes", "--grace", "31d"),
        ("shred", "--tenant", "acme", "--reason", "r", "--yes", "--key", "keys/none"),
        ("shred", "--tenant", "acme", "--reason", "r", "--yes", "--key", "keys/dpo.pub"),
        ("release", "--reason", "r"),
        ("command", "send", "none.json"),
        ("command", "show", "sidecar.yaml"),
        ("issuer", "show", "keys/kek"),
    ],
    ids=" ".join,
)
def test_what_makes_no_sense_is_refused_here_and_not_sent(user: User, words: tuple[str, ...]) -> None:
    done = user.run(*words)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.strip()


def test_a_key_that_others_may_read_signs_nothing(user: User) -> None:
    (user.folder / "keys" / "issuer").chmod(0o640)
    done = user.run("rotate", "--tenant", "acme", "--reason", "r")
    assert (done.returncode, "chmod 0600" in done.stderr) == (2, True)


def test_a_command_that_was_signed_by_hand_is_carried_out(served: User) -> None:
    """The example of docs/commands.md, as it stands there."""
    page = (ROOT / "docs" / "commands.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert PAYLOAD_TYPE in script
    settings = load(served.config)
    given = {
        "DEPLOYMENT": settings.deployment,
        "BOOTSTRAP": settings.kafka.bootstrap_servers,
        "TOPIC": settings.control.topic,
        "KEY": str(settings.control.issuer_key),
    }
    done = subprocess.run([sys.executable, "-c", script], env=dict(os.environ) | given, capture_output=True, text=True, check=True)
    command_id = done.stdout.strip()
    with_patience = ("receipts", "get", command_id)
    for _ in range(200):
        found = served.run("-o", "json", *with_patience)
        if found.returncode == 0 and json.loads(found.stdout)["status"] == "done":
            return
    pytest.fail(f"no receipt: {found.stdout}{found.stderr}")
