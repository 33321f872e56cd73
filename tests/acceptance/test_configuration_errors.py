"""Promise: a configuration that cannot be used is refused with three lines, what, where and how to mend, and exit code 2."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.acceptance.world import World


def refused(world: World, *words: str, environment: dict[str, str] | None = None) -> tuple[str, str, str]:
    """-> what, where, mend."""
    said = world.cli(*words, environment=environment)
    text = said.stderr.decode()
    lines = [line for line in text.splitlines() if not line.startswith("{")]
    assert said.returncode == 2, text
    assert said.stdout == b""
    assert "Traceback" not in text
    assert len(lines) == 3, text
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("  where: ")
    assert lines[2].startswith("  mend:  ")
    return lines[0].removeprefix("error: "), lines[1].removeprefix("  where: "), lines[2].removeprefix("  mend:  ")


CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"batsh": {}}, "'batsh' is no setting", "batsh"),
    ({"batch": {"max_recrods": 1}}, "'max_recrods' is no setting", "batch.max_recrods"),
    ({"batch": {"max_records": 0}}, "greater than or equal to 1", "batch.max_records"),
    ({"limits": {"max_record_bytes": "many"}}, "byte", "limits.max_record_bytes"),
    ({"deployment": "a b"}, "pattern", "deployment"),
    ({"sources": [{"topic": "t", "tenant": "cookie:x"}]}, "no extractor", "sources.0.tenant"),
    ({"sources": [{"topic": "t", "start": "middle"}]}, "earliest", "sources.0.start"),
    ({"policies": {"install": [{"class": "A", "algorithm": "ROT13"}]}}, "unknown algorithm 'ROT13'", "policies.install.0.algorithm"),
    ({"policies": {"unmatched": "shrug"}}, "refuse", "policies.unmatched"),
    ({"views": [{"name": "a", "topic": "t"}, {"name": "a", "topic": "u"}]}, "stands twice", "top level"),
    ({"views": [{"name": "a", "topic": "t", "retention": "soon"}]}, "no duration", "views.0.retention"),
    ({"kafka": {"security": {"protocol": "SASL_SSL"}}}, "needs mechanism", "kafka.security"),
    ({"profile": "production", "control": {"allow_unsigned": True}, "kafka": {"security": {"protocol": "SSL"}}, "kms": {"uri": "pkcs11:x"}}, "allow_unsigned", "control.allow_unsigned"),
    ({"profile": "production", "kafka": {"security": {"protocol": "SSL"}}}, "kms.uri", "kms.uri"),
    ({"profile": "production", "kms": {"uri": "pkcs11:x"}}, "kafka.security.protocol", "kafka.security.protocol"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "what", "where"), CASES, ids=[f"{where}: {what}" for _, what, where in CASES])
def test_every_command_refuses_a_bad_setting(world: World, changes: dict[str, Any], what: str, where: str) -> None:
    document = json.loads(world.config.read_text())
    for name, section in changes.items():
        merge = isinstance(section, dict) and "profile" not in changes
        document[name] = document.get(name, {}) | section if merge else section
    if "profile" in changes and "control" not in changes:
        document["control"]["allow_unsigned"] = False
    world.config.write_text(json.dumps(document))
    found = refused(world, "config", "check")
    assert what in found[0]
    assert where in found[1]
    assert found[2]


def test_the_file_itself(world: World) -> None:
    world.config.write_text("a: [")
    assert "cannot be read" in refused(world, "run")[0]
    world.config.write_text("- a")
    assert "no mapping" in refused(world, "status")[0]
    world.config.unlink()
    assert refused(world, "control")[1] == str(world.config)


def test_the_environment_is_checked_too(world: World) -> None:
    assert "batch.max_records" in refused(world, "config", "check", environment={"SIDECAR_BATCH__MAX_RECORDS": "none"})[1]
    assert "SIDECAR_POSTGRES__DSN_FILE" in refused(world, "config", "check", environment={"SIDECAR_POSTGRES__DSN_FILE": "/no/such/file"})[1]


def test_run_refuses_what_it_cannot_start_with(world: World) -> None:
    document = json.loads(world.config.read_text())
    world.config.write_text(json.dumps(document | {"sources": []}))
    assert refused(world, "run")[1] == "sources"
    (world.folder / "kek").chmod(0o644)
    world.config.write_text(json.dumps(document))
    assert "kek" in " ".join(refused(world, "run"))
    (world.folder / "kek").unlink()
    assert "kek" in " ".join(refused(world, "run"))


def test_a_view_whose_topic_has_other_partitions_than_it_began_with_is_refused(make_world: Callable[..., World]) -> None:
    from confluent_kafka.admin import AdminClient, NewPartitions

    from sidecar.kafka.client import client_config

    world = make_world()
    world.run().stop()
    admin = AdminClient(client_config(world.settings))
    admin.create_partitions([NewPartitions(world.topic("view"), 4)])[world.topic("view")].result(10)
    assert "3 partitions" in refused(world, "run")[0]
