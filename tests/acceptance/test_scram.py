"""Promise: both planes and the command line work over SASL with SCRAM by configuration alone; a bad password is said in one line."""

import json
from collections.abc import Callable

from sidecar.core.model import Scope
from tests.acceptance.world import World


def over_sasl(world: World, *, password: str | None = None, user: str = "sidecar") -> World:
    """The same world, its processes with credentials in a file."""
    secret = world.folder / "password"
    secret.write_text((password or world.stack.credentials()[user]) + "\n")
    secret.chmod(0o600)
    document = json.loads(world.config.read_text())
    document["kafka"]["bootstrap_servers"] = world.stack.sasl_bootstrap_servers
    document["kafka"]["security"] = {"protocol": "SASL_PLAINTEXT", "mechanism": "SCRAM-SHA-256", "username": user, "password_file": "password"}
    world.config.write_text(json.dumps(document))
    return world


def test_both_planes_and_the_command_line_work_over_scram(world: World) -> None:
    over_sasl(world)
    control, data = world.control(wait=False), world.run()
    control.wait_ready()
    published = world.cli("publish", world.topic("in"), "--tenant", "acme", "--stream", "aes-1", "--type", "T", stdin=b"v")
    assert published.returncode == 0, published.stderr
    at = json.loads(published.stdout)
    world.sent[at["topic"], at["partition"]] = at["offset"] + 1
    world.settle()
    said = world.cli("subscribe", world.topic("view"), "--from-beginning", "--max", "1")
    assert json.loads(said.stdout)["value"] == "v"
    receipt = world.carry_out("shred", Scope.of_tenant("acme"))
    assert receipt["status"] == "inaccessible"
    assert [row["status"] for row in world.events("acme")] == ["erased"]
    assert data.stop() == 0
    assert control.stop() == 0
    assert world.stack.credentials()["sidecar"] not in data.text() + control.text()


def test_a_bad_password_is_a_configuration_error(make_world: Callable[..., World]) -> None:
    world = over_sasl(make_world(), password="wrong-password")
    for words in (("topics", "plan"), ("run",)):
        said = world.cli(*words)
        text = said.stderr.decode()
        assert said.returncode == 2, (words, text)
        assert "Traceback" not in text
        assert "authentication" in text.lower()
        assert "wrong-password" not in text
