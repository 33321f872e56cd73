"""Configuration: precedence, closed names, secrets from files, production's refusals, errors that say how to mend."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.aead import Suite
from sidecar.core.errors import ConfigurationError
from sidecar.core.model import duration_ms
from sidecar.settings import ENV_PREFIX, Settings, load, parse

PRODUCTION: dict[str, Any] = {
    "profile": "production",
    "kms": {"uri": "pkcs11:token"},
    "kafka": {"security": {"protocol": "SSL"}},
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(ENV_PREFIX):
            monkeypatch.delenv(name)


def written(folder: Path, document: dict[str, Any]) -> Path:
    path = folder / "sidecar.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def refused(document: dict[str, Any]) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as raised:
        parse(document, where="sidecar.yaml", base=Path("/"))
    return raised.value


def test_flags_come_before_environment_before_file_before_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, {"http": {"port": 1, "host": "10.0.0.1"}, "deployment": "file", "batch": {"max_records": 7}})
    monkeypatch.setenv("SIDECAR_HTTP__PORT", "2")
    monkeypatch.setenv("SIDECAR_DEPLOYMENT", "environment")
    settings = load(path, flags={"http": {"port": 3}})
    assert (settings.http.port, settings.http.host, settings.deployment) == (3, "10.0.0.1", "environment")
    assert (settings.batch.max_records, settings.batch.max_wait_ms) == (7, 50)


def test_environment_reaches_lists_and_mappings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDECAR_SOURCES", "[{topic: users, tenants: [acme]}]")
    monkeypatch.setenv("SIDECAR_KAFKA__CLIENT", '{"linger.ms": 5}')
    settings = load(written(tmp_path, {}))
    assert settings.sources[0].tenants == ["acme"]
    assert settings.kafka.client == {"linger.ms": 5}


def test_secret_comes_from_a_file_and_is_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dsn").write_text("postgresql://u:hunter2@db/sidecar\n")
    (tmp_path / "password").write_text("hunter3\n")
    monkeypatch.setenv("SIDECAR_POSTGRES__DSN_DATA_FILE", str(tmp_path / "dsn"))
    monkeypatch.setenv("SIDECAR_KAFKA__SECURITY__PASSWORD_FILE", str(tmp_path / "password"))
    security = {"protocol": "SASL_SSL", "mechanism": "SCRAM-SHA-512", "username": "sidecar"}
    settings = load(written(tmp_path, {"kafka": {"security": security}}))
    assert settings.postgres.for_role("data") == "postgresql://u:hunter2@db/sidecar"
    assert settings.postgres.for_role("control") == "postgresql:///sidecar"
    assert settings.kafka.security.secret() == "hunter3"
    assert "hunter" not in repr(settings) + settings.model_dump_json()


def test_mounted_secret_that_changes_is_read_anew(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("old")
    security = {"protocol": "SASL_SSL", "mechanism": "PLAIN", "username": "u", "password_file": "password"}
    settings = load(written(tmp_path, {"kafka": {"security": security}}))
    (tmp_path / "password").write_text("new")
    assert settings.kafka.security.secret() == "new"


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    settings = load(written(tmp_path, {"kafka": {"security": {"ca_file": "ca.pem"}}}))
    assert settings.kafka.security.ca_file == tmp_path / "ca.pem"
    assert settings.kms.uri == f"file:{tmp_path}/keys/kek"


def test_files_that_a_kms_uri_names_are_relative_to_the_file_too_and_the_rest_of_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    vault = "vault:transit/kek?address=https://vault:8200"
    hsm = "pkcs11:token=a token;object=kek?module-path=/usr/lib/hsm.so&pin-source=file:pin"
    settings = load(written(tmp_path, {"kms": {"uri": hsm, "uri_control": f"{vault}&token-file=./control.token", "uri_reader": "file:kek"}}))
    assert settings.kms.for_role("data") == settings.kms.uri
    assert settings.kms.uri == f"pkcs11:token=a token;object=kek?module-path=/usr/lib/hsm.so&pin-source={tmp_path}/pin"
    assert settings.kms.for_role("control") == f"{vault}&token-file={tmp_path}/control.token"
    assert settings.kms.for_role("reader") == f"file:{tmp_path}/kek"


CLOSED: list[tuple[str, dict[str, Any]]] = [
    ("polcies", {"polcies": {}}),
    ("boostrap_servers", {"kafka": {"boostrap_servers": "x"}}),
    ("tennant", {"sources": [{"topic": "t", "tennant": "header:x"}]}),
    ("topics", {"classes": [{"class": "A", "when": {"topics": "t"}}]}),
]


@pytest.mark.parametrize(("name", "document"), CLOSED)
def test_misspelt_name_is_an_error_that_names_it(name: str, document: dict[str, Any]) -> None:
    assert refused(document).what == f"'{name}' is no setting"


WRONG: list[dict[str, Any]] = [
    {"http": {"port": 70_000}},
    {"batch": {"max_records": 0}},
    {"views": [{"name": "a", "topic": "x"}, {"name": "a", "topic": "y"}]},
    {"views": [{"name": "a", "topic": "x"}, {"name": "b", "topic": "x"}]},
    {"views": [{"name": "a", "topic": "x", "retention": "7 days"}]},
    {"sources": [{"topic": "t", "tenant": "body:/x"}]},
    {"policies": {"unmatched": "ignore"}},
    {"policies": {"install": [{"class": "A", "algorithm": "AES-128-GCM"}]}},
    {"policies": {"install": [{"class": "A", "subject": "header:person"}]}},
    {"policies": {"install": [{"class": "A", "key_scope": "subject", "subject": "const:jane"}]}},
    {"kafka": {"security": {"protocol": "SASL_SSL"}}},
    {"deployment": "../x"},
    {"kafka": None},
    {"kafka": "localhost"},
    {"sources": {"topic": "t"}},
]


@pytest.mark.parametrize("document", WRONG, ids=lambda document: next(iter(document)))
def test_error_is_three_lines_what_where_and_how_to_mend(document: dict[str, Any]) -> None:
    error = refused(document)
    lines = str(error).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("  where: sidecar.yaml: ")
    assert lines[2].startswith("  mend:  ")


def test_error_does_not_repeat_a_secret() -> None:
    assert "hunter2" not in str(refused({"postgres": {"dsn": ["hunter2"]}}))


FILES = [b"\xff\xfe\x00", b"a: [", b"- a\n", b"just text", b"a: \x00"]


@pytest.mark.parametrize("content", FILES)
def test_file_that_is_no_configuration_is_a_configuration_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "sidecar.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError):
        load(path)


def test_missing_file_says_which_command_writes_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="sidecar init"):
        load(tmp_path / "sidecar.yaml")


ENVIRONMENTS = [
    {"SIDECAR_KAFKA": "x", "SIDECAR_KAFKA__BOOTSTRAP_SERVERS": "y"},
    {"SIDECAR_KAFKA__BOOTSTRAP_SERVERS": "y", "SIDECAR_KAFKA": "x"},
    {"SIDECAR_SOURCES": "[{topic"},
    {"SIDECAR_POSTGRES__DSN_FILE": "/nowhere"},
    {"SIDECAR_PORT": "tcp://10.0.0.7:8080"},
    {"SIDECAR_HTTP__PORT": ""},
]


@pytest.mark.parametrize("variables", ENVIRONMENTS, ids=lambda v: "+".join(v))
def test_variable_that_makes_no_sense_is_a_configuration_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError):
        load(written(tmp_path, {}))


REFUSALS: list[tuple[str, dict[str, Any]]] = [
    ("kms.uri", {"kms": {"uri": "file:./keys/kek"}}),
    ("control.allow_unsigned", {"control": {"allow_unsigned": True}}),
    ("kafka.security.protocol", {"kafka": {}}),
    ("kafka.security.protocol", {"kafka": {"security": {"protocol": "SASL_PLAINTEXT", "mechanism": "PLAIN", "username": "u", "password": "p"}}}),
]


@pytest.mark.parametrize(("where", "change"), REFUSALS)
def test_production_refuses_each_development_default_by_name(where: str, change: dict[str, Any]) -> None:
    assert parse(PRODUCTION, where="f", base=Path("/")).profile == "production", "control: whole, it is accepted"
    assert refused(PRODUCTION | change).where == where


DURATIONS = [("500ms", 500), ("45s", 45_000), ("30m", 1_800_000), ("1h", 3_600_000), ("7d", 604_800_000), ("0s", 0)]


@pytest.mark.parametrize(("text", "expected"), DURATIONS)
def test_durations_are_milliseconds(text: str, expected: int) -> None:
    assert duration_ms(text) == expected


@given(st.text("0123456789dhms .-²", max_size=6))
def test_text_is_a_duration_or_a_value_error(text: str) -> None:
    try:
        assert duration_ms(text) >= 0
    except ValueError:
        return
    assert text[0].isdigit() and text[-1] in "dhms"


def test_size_may_be_written_with_its_unit() -> None:
    limits = parse({"limits": {"max_record_bytes": "10MiB"}, "batch": {"max_bytes": "16MiB"}}, where="f", base=Path("/"))
    assert (limits.limits.max_record_bytes, limits.batch.max_bytes) == (10 * 2**20, 16 * 2**20)


def test_bare_off_is_off_as_yaml_reads_it() -> None:
    assert parse(yaml.safe_load("sources: [{topic: t, purge: off}]"), where="f", base=Path("/")).sources[0].purge == "off"


@given(st.sampled_from(list(Suite)), st.sampled_from(["stream", "class", "tenant", "subject"]), st.none() | st.integers(1, 4000), st.booleans())
def test_policy_as_written_becomes_the_policy(suite: Suite, scope: str, days: int | None, encrypt: bool) -> None:
    spec = {"class": "A", "tenant": "acme", "encrypt": encrypt, "algorithm": suite.label, "key_scope": scope, "rotation_days": days}
    policy = parse({"policies": {"install": [spec]}}, where="f", base=Path("/")).policies.install[0].policy("p", 3)
    assert (policy.stream_class, policy.tenant, policy.encrypt, policy.suite, policy.key_scope) == ("A", "acme", encrypt, suite, scope)
    assert (policy.policy_id, policy.rotation_days, policy.version) == ("p", days, 3)
    assert policy.subject == ("header:ce_subjectid" if scope == "subject" else None)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.dictionaries(st.sampled_from([*Settings.model_fields, "other"]), json_values, max_size=4))
def test_any_document_is_settings_or_a_configuration_error(document: dict[str, Any]) -> None:
    with suppress(ConfigurationError):
        parse(document, where="f", base=Path("/"))
