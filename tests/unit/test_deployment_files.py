"""Dockerfile, docker-compose.yml and chart: what can be known of them without a container engine. The rest: make helm-check."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from sidecar.settings import parse

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"].startswith("sidecar:")}
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SIDECAR = Path(sys.executable).parent / "sidecar"


def instructions(of: str) -> list[str]:
    joined = re.sub(r"\\\n", " ", "\n".join(line for line in of.splitlines() if not line.startswith("#")))
    return [line for line in joined.splitlines() if line.strip()]


def commands() -> dict[str, list[str]]:
    """Service → the command line of ours that it runs."""
    found = {}
    for name, service in OURS.items():
        words: list[str] = service.get("command", ["run"])
        if "entrypoint" in service:
            shell = shlex.split(words[0])
            words = shell[shell.index("sidecar") + 1 :]
        found[name] = words
    return found


def test_compose_runs_what_the_design_names() -> None:
    assert {"kafka", "postgres", "init", "migrate", "topics", "data", "control", "worker"} <= SERVICES.keys()
    assert set(OURS) == {"init", "migrate", "topics", "data", "control", "worker"}


@pytest.mark.parametrize(("service", "words"), commands().items(), ids=list(commands()))
def test_command_of_compose_is_a_command_line_of_ours(service: str, words: list[str]) -> None:
    done = subprocess.run([SIDECAR, *words, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: sidecar" in done.stdout
    for option in (word for word in words if word.startswith("--")):
        assert option in done.stdout


def test_control_a_command_that_does_not_exist_is_noticed() -> None:
    done = subprocess.run([SIDECAR, "migrate", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 2


@pytest.mark.parametrize("service", SERVICES)
def test_image_is_pinned(service: str) -> None:
    image = SERVICES[service]["image"]
    assert re.fullmatch(r"[a-z/.-]+:[A-Za-z0-9._-]+", image), image
    assert not image.endswith(":latest")


def test_broker_and_database_are_those_that_the_product_was_tried_on() -> None:
    assert (SERVICES["kafka"]["image"], SERVICES["postgres"]["image"]) == ("apache/kafka:4.3.1", "postgres:18")


@pytest.mark.parametrize("service", OURS)
def test_service_of_ours_has_no_rights_that_it_does_not_need(service: str) -> None:
    found = OURS[service]
    assert found["read_only"] is True
    assert found["cap_drop"] == ["ALL"]
    assert found["security_opt"] == ["no-new-privileges:true"]
    assert found["ulimits"]["core"] == 0
    assert not {"user", "privileged", "network_mode"} & found.keys()
    assert "configs" not in found, "Compose copies them in, which a read-only root refuses (docker/compose#12031): mount the file"


@pytest.mark.parametrize("service", SERVICES)
def test_ports_are_open_to_this_machine_only(service: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[service].get("ports", []))


def test_planes_start_after_what_they_need_and_say_when_they_are_ready() -> None:
    for plane in ("data", "control", "worker"):
        waits = {name: how["condition"] for name, how in SERVICES[plane]["depends_on"].items()}
        assert waits == dict.fromkeys(("init", "migrate", "topics", "source-topic"), "service_completed_successfully")
        assert "/readyz" in " ".join(SERVICES[plane]["healthcheck"]["test"])
    for name in ("kafka", "postgres"):
        assert SERVICES[name]["healthcheck"]["test"]


def test_healthcheck_of_compose_is_a_program() -> None:
    program = SERVICES["data"]["healthcheck"]["test"]
    assert program[:3] == ["CMD", "python", "-c"]
    compile(program[3], "healthcheck", "exec")


def test_configuration_in_compose_loads_and_reaches_its_neighbours() -> None:
    mounted = {target: source for source, target, *_ in (volume.split(":") for volume in OURS["data"]["volumes"])}
    document = yaml.safe_load((ROOT / mounted["/etc/sidecar/sidecar.yaml"]).read_text())
    settings = parse(document, where="docker-compose.sidecar.yaml", base=Path("/etc/sidecar"))
    assert settings.kafka.bootstrap_servers == "kafka:9092"
    assert "INSIDE://kafka:9092" in SERVICES["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    assert (settings.http.host, settings.http.port) == ("0.0.0.0", 8080)
    key = settings.kms.uri.removeprefix("file:")
    assert key in OURS["init"]["command"][0]
    assert any(Path(key).is_relative_to(target) for target, source in mounted.items() if source == "keys")
    assert f"@postgres:5432/{SERVICES['postgres']['environment']['POSTGRES_DB']}" in OURS["data"]["environment"]["SIDECAR_POSTGRES__DSN"]
    assert settings.sources[0].topic in SERVICES["source-topic"]["command"]


def test_every_volume_of_compose_is_declared_and_used() -> None:
    used = {volume.partition(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert {name for name in used if not name.startswith(".")} == COMPOSE["volumes"].keys()


# ---- Dockerfile -------------------------------------------------------------------------------------------------------


def faults_of_dockerfile(text: str) -> list[str]:
    steps = instructions(text)
    final = steps[max(at for at, step in enumerate(steps) if step.startswith("FROM ")) :]
    users = [step.split()[1] for step in final if step.startswith("USER ")]
    faults = []
    if not users or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]):
        faults.append("root")
    if sum(step.startswith("FROM ") for step in steps) < 2:
        faults.append("one stage")
    if not re.search(r"^ARG PYTHON_IMAGE=python:3\.1[2-9][a-z0-9.-]+$", text, re.MULTILINE):
        faults.append("not pinned")
    fetches = [step for step in steps if re.search(r"pip (download|install|wheel)", step) and "--no-index" not in step]
    if not fetches or not all("--require-hashes" in step and "requirements.lock" in step for step in fetches):
        faults.append("without hashes")
    if "https://" in text or "--index-url" in text:
        faults.append("an address")
    return faults


BROKEN: dict[str, Callable[[str], str]] = {
    "root": lambda text: text.replace("USER 10001:10001", "USER root"),
    "one stage": lambda text: text.partition("FROM ${PYTHON_IMAGE}\n")[0] + "USER 1",
    "not pinned": lambda text: text.replace("python:3.12-slim-bookworm", "python:latest"),
    "without hashes": lambda text: text.replace(" --require-hashes", ""),
    "an address": lambda text: text.replace("pip download", "pip download --index-url https://index.example.org"),
}


def test_image_is_built_in_stages_from_hashes_and_does_not_run_as_root() -> None:
    assert faults_of_dockerfile(DOCKERFILE) == []


@pytest.mark.parametrize("fault", BROKEN)
def test_control_a_dockerfile_with_a_fault_is_noticed(fault: str) -> None:
    assert fault in faults_of_dockerfile(BROKEN[fault](DOCKERFILE))


def test_everything_that_the_build_copies_is_let_through_and_stands_here() -> None:
    copied = [word for step in instructions(DOCKERFILE) if step.startswith("COPY ") and "--from" not in step for word in step.split()[1:-1]]
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) <= allowed
    assert all((ROOT / path).exists() for path in copied)


def test_image_starts_our_command() -> None:
    found = {step.split()[0]: json.loads(step.partition(" ")[2]) for step in instructions(DOCKERFILE) if step.startswith(("ENTRYPOINT", "CMD"))}
    assert found == {"ENTRYPOINT": ["sidecar"], "CMD": ["run"]}


# ---- chart ------------------------------------------------------------------------------------------------------------


def chart_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("helm_check", ROOT / "helm" / "check.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_places(schema: dict[str, Any], at: str = "") -> set[str]:
    """Where the values schema lets unknown names in."""
    if schema.get("type") != "object":
        return open_places(schema["items"], f"{at}[]") if isinstance(schema.get("items"), dict) else set()
    here = set() if "additionalProperties" in schema else {at}
    for name, inner in schema.get("properties", {}).items():
        if isinstance(inner, dict):
            here |= open_places(inner, f"{at}.{name}")
    return here


def test_values_are_closed_but_for_kubernetes_own_and_the_configuration() -> None:
    schema = json.loads((ROOT / "helm" / "values.schema.json").read_text())
    kubernetes = {f".{plane}.{name}" for plane in ("data", "control", "worker") for name in ("affinity", "tolerations[]")}
    assert open_places(schema) == kubernetes | {".global", ".config", ".config.http", ".config.postgres"}


def test_default_configuration_of_the_chart_loads() -> None:
    values = yaml.safe_load((ROOT / "helm" / "values.yaml").read_text())
    settings = parse(values["config"], where="values.yaml", base=Path("/etc/sidecar"))
    assert settings.http.host == "0.0.0.0"
    assert settings.sources


def test_version_of_the_chart_is_the_products() -> None:
    from sidecar import __version__

    chart = yaml.safe_load((ROOT / "helm" / "Chart.yaml").read_text())
    assert chart["appVersion"] == chart["version"] == __version__


GOOD_POD: dict[str, Any] = {
    "automountServiceAccountToken": False,
    "enableServiceLinks": False,
    "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
    "containers": [
        {
            "name": "sidecar",
            "args": ["run"],
            "securityContext": {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}},
            "resources": {"limits": {"memory": "1Gi"}},
            "livenessProbe": {"httpGet": {"path": "/livez"}},
            "readinessProbe": {"httpGet": {"path": "/readyz"}},
        }
    ],
}


def pod_with(path: str, value: Any) -> list[dict[str, Any]]:
    pod = deepcopy(GOOD_POD)
    here: Any = pod
    *parents, last = path.split("/")
    for name in parents:
        here = here[int(name)] if isinstance(here, list) else here[name]
    here[last] = value
    return [{"kind": "Deployment", "metadata": {"name": "x"}, "spec": {"template": {"spec": pod}}}]


POD_FAULTS: list[tuple[str, Any]] = [
    ("securityContext/runAsNonRoot", False),
    ("securityContext/runAsUser", 0),
    ("securityContext/seccompProfile", {}),
    ("automountServiceAccountToken", True),
    ("enableServiceLinks", None),
    ("hostNetwork", True),
    ("volumes", [{"name": "x", "hostPath": {"path": "/"}}]),
    ("containers/0/securityContext/allowPrivilegeEscalation", True),
    ("containers/0/securityContext/readOnlyRootFilesystem", False),
    ("containers/0/securityContext/capabilities", {"drop": ["NET_RAW"]}),
    ("containers/0/resources", {}),
    ("containers/0/env", [{"name": "X", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]),
    ("containers/0/volumeMounts", [{"name": "nowhere", "mountPath": "/x"}]),
    ("containers/0/readinessProbe/httpGet", {"path": "/livez"}),
]


@pytest.mark.parametrize(("path", "value"), POD_FAULTS, ids=[path for path, _ in POD_FAULTS])
def test_control_the_charts_check_notices_each_fault_of_a_pod(path: str, value: Any) -> None:
    faults_of_pods = chart_check().faults_of_pods
    assert faults_of_pods(pod_with("automountServiceAccountToken", False)) == []
    assert len(faults_of_pods(pod_with(path, value))) == 1
