"""`sidecar kms` as a user calls it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sidecar.testing import control_plane as kit
from sidecar.testing import kms_conformance as suite
from sidecar.testing.local_stack import LocalStack
from sidecar.testing.softhsm import SoftHsm
from sidecar.testing.transit_server import TransitServer, transit_server_thread


def sidecar(*words: str, folder: Path) -> tuple[int, Any, str]:
    """-> exit code, what stdout is as JSON (None: nothing), stderr."""
    done = subprocess.run([sys.executable, "-m", "sidecar", *words], capture_output=True, text=True, timeout=120, cwd=folder)
    return done.returncode, json.loads(done.stdout) if done.stdout.strip() else None, done.stderr


def uri_of(server: TransitServer, token: str, folder: Path) -> str:
    (folder / "token").write_text(token)
    return f"vault:transit/kek?address={server.address}&token-file=token"


def test_key_is_created_once_and_the_suite_runs_green_against_it(softhsm: SoftHsm, tmp_path: Path) -> None:
    uri = softhsm.make_token()
    kit.write_config(tmp_path, {"kms": {"uri": uri}})
    code, made, _ = sidecar("kms", "create", folder=tmp_path)
    assert (code, list(made)) == (0, ["kms_key_version"])
    code, _, error = sidecar("kms", "create", folder=tmp_path)
    assert code == 1
    assert made["kms_key_version"] in error
    code, results, error = sidecar("kms", "conformance", "--uri", uri, "--yes-destroy", "-o", "json", folder=tmp_path)
    assert code == 0
    assert [result["check"] for result in results] == [check.__name__ for check in suite.CHECKS]
    assert {result["check"] for result in results if result["status"] != "passed"} == {"disabled_version_is_not_destroyed"}
    assert f"{len(suite.CHECKS)}/{len(suite.CHECKS)} passed" in error


def test_suite_without_leave_to_destroy_makes_no_key(tmp_path: Path) -> None:
    with transit_server_thread() as server:
        uri = uri_of(server, server.root, tmp_path)
        kit.write_config(tmp_path, {"kms": {"uri": uri}})
        assert sidecar("kms", "create", folder=tmp_path)[0] == 0
        code, results, error = sidecar("kms", "conformance", "--uri", uri, folder=tmp_path)
        assert (code, len(results)) == (0, len(suite.HARMLESS))
        assert "--yes-destroy" in error
        assert [path for _, path in server.keys] == ["transit/keys/kek"]
        assert [*server.keys["", "transit/keys/kek"].versions] == [1]


def test_suite_is_red_where_the_identity_may_not_destroy(tmp_path: Path) -> None:
    with transit_server_thread() as server:
        everyday = {"transit/keys/+": {"read", "update"}, "transit/encrypt/+": {"update"}, "transit/decrypt/+": {"update"}}
        kit.write_config(tmp_path, {"kms": {"uri": uri_of(server, server.root, tmp_path)}})
        assert sidecar("kms", "create", folder=tmp_path)[0] == 0
        uri = uri_of(server, server.grant(everyday), tmp_path)
        code, results, error = sidecar("kms", "conformance", "--uri", uri, "--yes-destroy", folder=tmp_path)
        assert code == 1
        assert "identity_may_destroy" in {result["check"] for result in results if result["status"] == "failed"}
        assert "checks failed" in error


@pytest.mark.parametrize("role", ["data", "control"])
def test_check_says_what_start_up_would(tmp_path: Path, role: str) -> None:
    with transit_server_thread() as server:
        kit.write_config(tmp_path, {"kms": {"uri": uri_of(server, server.root, tmp_path)}})
        code, _, error = sidecar("kms", "check", "--role", role, folder=tmp_path)
        assert code == 2
        assert "there is no such key" in error
        assert "sidecar kms create" in error
        assert sidecar("kms", "create", folder=tmp_path)[0] == 0
        code, found, _ = sidecar("kms", "check", "--role", role, folder=tmp_path)
        assert (code, found) == (0, {"uri": "vault:transit/kek", "role": role, "status": "ok"})
        server.keys["", "transit/keys/kek"].exportable = True
        code, _, error = sidecar("kms", "check", "--role", role, folder=tmp_path)
        assert code == 2
        assert "exportable" in error


def test_planes_do_not_start_with_a_kms_identity_that_may_too_little_or_too_much(
    local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]
) -> None:
    with transit_server_thread() as server:
        everyday = {"transit/keys/+": {"read", "update"}, "transit/encrypt/+": {"update"}, "transit/decrypt/+": {"update"}}
        config = {"deployment": unique("kms"), "kafka": {"bootstrap_servers": local_stack.bootstrap_servers}, "postgres": {"dsn": database}}
        config |= {"kms": {"uri": uri_of(server, server.root, tmp_path)}, "sources": [{"topic": "users"}]}
        kit.write_config(tmp_path, config)
        assert sidecar("kms", "create", folder=tmp_path)[0] == 0
        uri_of(server, server.grant(everyday), tmp_path)
        code, _, error = sidecar("control", folder=tmp_path)
        assert code == 2
        assert "may not destroy: it lacks update on transit/keys/kek/rotate" in error
        uri_of(server, server.root, tmp_path)
        server.keys["", "transit/keys/kek"].deletion_allowed = False
        code, _, error = sidecar("control", folder=tmp_path)
        assert code == 2
        assert "deletion_allowed=true" in error
        strict = {"profile": "production", "kafka": {"bootstrap_servers": "127.0.0.1:1", "security": {"protocol": "SSL"}}}
        kit.write_config(tmp_path, config | strict)
        code, _, error = sidecar("run", folder=tmp_path)
        assert code == 2
        assert "the data plane's KMS identity may destroy keys" in error
        assert "kms.uri_control" in error


def test_status_says_what_destroying_means_and_lists_no_epoch_before_the_first_tenant(local_stack: LocalStack, database: str, tmp_path: Path) -> None:
    kit.write_config(tmp_path, {"postgres": {"dsn": database}})
    assert sidecar("db", "migrate", folder=tmp_path)[0] == 0
    code, found, _ = sidecar("kms", "status", folder=tmp_path)
    assert code == 0
    assert {name: found[name] for name in ("uri", "provider", "destroys", "delay_days", "reversible", "may_destroy", "epochs")} == {
        "uri": "file:kek",
        "provider": "file",
        "destroys": "version",
        "delay_days": 0,
        "reversible": False,
        "may_destroy": True,
        "epochs": [],
    }
