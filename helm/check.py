"""What helm itself does not look at, in rendered documents.    python helm/check.py pods|config|misspell FILE

pods      every pod is restricted, as Kubernetes' Pod Security Standard has it, and probes what our planes answer
config    the rendered sidecar.yaml loads with `sidecar config check`, under the environment that each container gets
misspell  control: prints the documents with a misspelt probe setting, which a validator must notice
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]
SECRETS = "/run/secrets/sidecar"


def documents(file: str) -> list[Document]:
    return [document for document in yaml.safe_load_all(Path(file).read_text()) if document]


def pods(rendered: list[Document]) -> Iterator[tuple[str, Document]]:
    for document in rendered:
        template = document.get("spec", {}).get("template")
        if template:
            yield f"{document['kind']} {document['metadata']['name']}", template["spec"]


def containers(pod: Document) -> list[Document]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def faults_of_pods(rendered: list[Document]) -> list[str]:
    faults = [] if list(pods(rendered)) else ["no pods were rendered"]

    def demand(holds: bool, where: str, what: str) -> None:
        if not holds:
            faults.append(f"{where}: {what}")

    for where, pod in pods(rendered):
        security = pod.get("securityContext", {})
        demand(security.get("runAsNonRoot") is True and security.get("runAsUser", 0) > 0, where, "runs as root")
        demand(security.get("seccompProfile", {}).get("type") == "RuntimeDefault", where, "no seccomp profile")
        demand(pod.get("automountServiceAccountToken") is False, where, "mounts a service account's token")
        demand(pod.get("enableServiceLinks") is False, where, "service links would be taken for settings")
        demand(not any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")), where, "shares something of the host")
        demand(not any("hostPath" in volume for volume in pod.get("volumes", [])), where, "mounts a path of the host")
        mounted = {volume["name"] for volume in pod.get("volumes", [])}
        for container in containers(pod):
            here = f"{where}, container {container['name']}"
            security = container.get("securityContext", {})
            demand(security.get("allowPrivilegeEscalation") is False, here, "may gain privileges")
            demand(security.get("readOnlyRootFilesystem") is True, here, "may write to its image")
            demand(security.get("capabilities", {}).get("drop") == ["ALL"], here, "keeps capabilities")
            demand("memory" in container.get("resources", {}).get("limits", {}), here, "no limit of memory")
            demand(not any("secretKeyRef" in str(variable) for variable in container.get("env", [])), here, "a secret in a variable")
            demand({mount["name"] for mount in container.get("volumeMounts", [])} <= mounted, here, "mounts a volume that is not there")
            if container.get("args", [""])[0] in ("run", "control", "worker"):
                probed = {name: container.get(name, {}).get("httpGet", {}).get("path") for name in ("livenessProbe", "readinessProbe")}
                demand(probed == {"livenessProbe": "/livez", "readinessProbe": "/readyz"}, here, f"probes {probed}")
    return faults


def check_config(rendered: list[Document]) -> int:
    """0, or the exit code of the first `config check` that failed; its three lines stand on stderr."""
    configurations = {d["metadata"]["name"]: d["data"]["sidecar.yaml"] for d in rendered if d["kind"] == "ConfigMap"}
    checked = 0
    with tempfile.TemporaryDirectory() as folder:
        secrets = Path(folder, "secrets")
        secrets.mkdir()
        for _, pod in pods(rendered):
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            projected = [item for source in volumes["secrets"]["projected"]["sources"] for item in source["secret"]["items"]]
            for item in projected:
                (secrets / item["path"]).write_text("postgresql://db.example.org/sidecar")
            file = Path(folder, "sidecar.yaml")
            file.write_text(configurations[volumes["config"]["configMap"]["name"]])
            for container in pod["containers"]:
                given = {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}
                given = {name: value.replace(SECRETS, str(secrets)) for name, value in given.items()} | {"SIDECAR_CONFIG": str(file)}
                missing = [path for path in given.values() if path.startswith(str(secrets)) and not Path(path).is_file()]
                if missing:
                    print(f"{container['name']}: named in the environment but not mounted: {missing}", file=sys.stderr)
                    return 1
                environment = {name: value for name, value in os.environ.items() if not name.startswith("SIDECAR_")} | given
                command = [str(Path(sys.executable).parent / "sidecar"), "config", "check", "-o", "json"]
                done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
                if done.returncode:
                    return done.returncode
                checked += 1
    return 0 if checked >= 2 else 1


def misspelt(rendered: list[Document]) -> str:
    for _, pod in pods(rendered):
        for container in pod["containers"]:
            if "readinessProbe" in container:
                container["readinessProbe"]["periodSecond"] = container["readinessProbe"].pop("periodSeconds")
    return yaml.safe_dump_all(rendered)


def main(what: str, file: str) -> int:
    rendered = documents(file)
    if what == "config":
        return check_config(rendered)
    if what == "misspell":
        sys.stdout.write(misspelt(rendered))
        return 0
    faults = faults_of_pods(rendered)
    print("\n".join(faults), file=sys.stderr, end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
