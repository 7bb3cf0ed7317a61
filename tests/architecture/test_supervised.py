"""The units and manifests of deploy/: well-formed, and true to what the services say of their ends and themselves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.config import GatewayConfig
from gateway.vault import read_keys
from llmos import lifetime
from llmos.config import load
from llmos.healthcheck import HealthcheckConfig
from scheduler import decay
from scheduler.config import SchedulerConfig
from worker.config import WorkerConfig

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
SCHEMA = Path(__file__).with_name("kubernetes.schema.json")
SECTIONS: dict[str, type] = {
    "gateway": GatewayConfig,
    "scheduler": SchedulerConfig,
    "worker": WorkerConfig,
    "healthcheck": HealthcheckConfig,
}
ORDERED_DRAIN_S = decay._MAX_DRAIN_S
"""Longest drain that a scheduler orders of a worker."""


# systemd


def settings(unit: Path) -> dict[str, list[str]]:
    """Values by `Section.Key`, in order."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in unit.read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, separator, value = line.partition("=")
            assert separator, line
            found.setdefault(f"{section}.{key}", []).append(value)
    return found


def test_there_is_a_unit_for_each_service() -> None:
    assert [unit.stem for unit in UNITS] == ["llmos-gateway", "llmos-scheduler", "llmos-worker"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_units_are_well_formed(unit: Path, tmp_path: Path) -> None:
    """By systemd's own word where it is installed; by what we know of a unit anywhere."""
    found = settings(unit)
    assert {key.split(".")[0] for key in found} == {"Unit", "Service", "Install"}
    assert found["Service.Type"] == ["exec"]
    program = shutil.which("systemd-analyze")
    if program is None:
        return
    copy = tmp_path / unit.name
    # The installed program is not here; any other will do.
    copy.write_text(unit.read_text().replace("/opt/llmos/bin/python", sys.executable))
    done = subprocess.run([program, "verify", "--man=no", copy], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_units_start_again_what_helps_to_be_started_again(unit: Path) -> None:
    found = settings(unit)
    assert found["Service.Restart"] == ["on-failure"]
    left_alone = {int(status) for status in found["Service.RestartPreventExitStatus"][0].split()}
    assert left_alone == {lifetime.EXIT_SETUP, lifetime.EXIT_INTERRUPTED}
    assert lifetime.EXIT_ENDED == 0, "what systemd takes for a success"
    name = unit.stem.removeprefix("llmos-")
    assert found["Service.ExecStart"] == [f"/opt/llmos/bin/python -m {name}"]
    assert found["Service.EnvironmentFile"] == [f"-/etc/llmos/{name}.env"]
    assert found["Service.KillMode"] == ["mixed"], "the first signal is for the service, which sees to its children"
    assert int(found["Service.TimeoutStopSec"][0]) > drain_s(name) + 10


def test_only_the_gateways_unit_gets_the_stream_key() -> None:
    with_key = [unit.stem for unit in UNITS if "stream.key" in unit.read_text()]
    assert with_key == ["llmos-gateway"]
    (environment,) = settings(UNITS[0])["Service.Environment"]
    name, _, value = environment.partition("=")
    assert load(GatewayConfig, "gateway", environ={name: value}).stream_key_file == Path(value)


def drain_s(service: str, environ: Mapping[str, str] | None = None) -> float:
    """How long a service drains after SIGTERM, or by a scheduler's order."""
    config = load(SECTIONS[service], service, environ=environ or {})
    return max(float(getattr(config, "drain_s", 2.0)), ORDERED_DRAIN_S if service == "worker" else 0.0)


# compose


def test_compose_gives_the_stream_key_to_gateways_only(tmp_path: Path) -> None:
    document = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert list(document["secrets"]) == ["stream_key"]
    assert [name for name, service in document["services"].items() if "secrets" in service] == ["gateway"]
    environment = document["services"]["gateway"]["environment"]
    assert environment["LLMOS_GATEWAY_STREAM_KEY_FILE"] == "/run/secrets/stream_key"
    command = re.search(r"(openssl rand -hex 32) > (\S+)", (DEPLOY / "compose.yaml").read_text())
    assert command
    assert command[2] in f"deploy/{document['secrets']['stream_key']['file'].rpartition('-./')[2]}"
    key = tmp_path / "stream.key"
    key.write_bytes(subprocess.run(command[1].split(), capture_output=True, check=True, timeout=20).stdout)
    assert len(read_keys(key)) == 1


def test_compose_gives_each_service_longer_than_it_drains() -> None:
    document = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for name in ("gateway", "scheduler", "worker-1", "worker-2"):
        service = document["services"][name]
        config = load(SECTIONS[name.split("-")[0]], name.split("-")[0], environ=service["environment"])
        assert int(service["stop_grace_period"].removesuffix("s")) > getattr(config, "drain_s", 2.0) + 5


# Kubernetes


@dataclass(frozen=True)
class Kind:
    """The workload of one service."""

    service: str
    document: dict[str, Any]

    @property
    def pod(self) -> dict[str, Any]:
        return dict(self.document["spec"]["template"]["spec"])

    @property
    def container(self) -> dict[str, Any]:
        (container,) = self.pod["containers"]
        return dict(container)

    def environment(self) -> dict[str, str]:
        """What a pod of it sees."""
        known = {"metadata.name": f"llmos-{self.service}-0", "metadata.namespace": "llmos", "status.podIP": "10.1.2.3"}
        found: dict[str, str] = {}
        for entry in self.container["env"]:
            if "value" in entry:
                expand = re.sub(r"\$\((\w+)\)", lambda match: found[match[1]], entry["value"])
                found[entry["name"]] = expand
            else:
                field = entry["valueFrom"].get("fieldRef")
                found[entry["name"]] = known[field["fieldPath"]] if field else "a secret"
        return found


def documents() -> list[dict[str, Any]]:
    return [document for file in MANIFESTS for document in yaml.safe_load_all(file.read_text())]


def of_kind(*kinds: str) -> list[dict[str, Any]]:
    return [document for document in documents() if document["kind"] in kinds]


WORKLOADS = {
    kind.service: kind
    for kind in (
        Kind(one["metadata"]["name"].removeprefix("llmos-"), one) for one in of_kind("Deployment", "StatefulSet")
    )
}


def test_manifests_follow_their_schema(tmp_path: Path) -> None:
    files = []
    for number, document in enumerate(documents()):
        files.append(tmp_path / f"{number}-{document['kind']}.json")
        files[-1].write_text(json.dumps(document))
    program = Path(sys.executable).parent / "check-jsonschema"
    done = subprocess.run([program, "--schemafile", SCHEMA, *files], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    files[0].write_text(json.dumps({**of_kind("PodDisruptionBudget")[0], "spec": {"minAvaliable": 1}}))
    done = subprocess.run([program, "--schemafile", SCHEMA, files[0]], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, "a misspelt field must be found"


def test_everything_is_listed_once() -> None:
    (kustomization,) = of_kind("Kustomization")
    assert sorted([*kustomization["resources"], "kustomization.yaml"]) == [file.name for file in MANIFESTS]
    assert set(WORKLOADS) == {"gateway", "scheduler", "worker"}


@pytest.mark.parametrize("service", ["gateway", "scheduler", "worker"])
def test_pods_accept_their_settings_and_outlive_their_drain(service: str) -> None:
    kind = WORKLOADS[service]
    environment = {name: value for name, value in kind.environment().items() if name.startswith("LLMOS_")}
    sections = {name.split("_")[1].lower() for name in environment}
    assert sections == {service} | ({"healthcheck"} if service != "gateway" else set())
    for section in sections:
        assert load(SECTIONS[section], section, environ=environment).tls.enabled
    stop = kind.container.get("lifecycle", {}).get("preStop")
    pause = int(stop["exec"]["command"][1]) if stop else 0
    assert kind.pod["terminationGracePeriodSeconds"] > pause + drain_s(service, environment) + 15


@pytest.mark.parametrize("service", ["gateway", "scheduler", "worker"])
def test_probes_ask_where_the_service_answers(service: str) -> None:
    kind = WORKLOADS[service]
    container, environment = kind.container, kind.environment()
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    config: Any = load(SECTIONS[service], service, environ={k: v for k, v in environment.items() if "LLMOS_" in k})
    if service == "gateway":
        assert ports == {"https": config.http_port, "grpc": config.grpc_port}
        asked = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
        assert {name: get["path"] for name, get in asked.items()} == {
            "startup": "/live",
            "liveness": "/live",
            "readiness": "/ready",
        }
        assert {(get["scheme"], get["port"]) for get in asked.values()} == {("HTTPS", "https")}
        return
    assert ports == {"grpc": config.port}
    for name in ("startup", "liveness", "readiness"):
        shell, flag, command = container[f"{name}Probe"]["exec"]["command"]
        assert (shell, flag) == ("sh", "-c"), "only a shell puts the pod's name in"
        expanded = re.sub(r"\$(\w+)", lambda match: environment[match[1]], command)
        assert expanded == f'exec python -m llmos.healthcheck "grpc://{config.host}:{config.port}"'


def test_what_is_named_exists() -> None:
    """Services, labels, budgets, volumes; and gateways know each scheduler's name."""
    names = {document["metadata"]["name"] for document in of_kind("Service")}
    for service, kind in WORKLOADS.items():
        spec, labels = kind.document["spec"], kind.document["spec"]["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"].items() <= labels.items()
        assert spec.get("serviceName", f"llmos-{service}") in names
        claims = {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", ())}
        volumes = {volume["name"] for volume in kind.pod["volumes"]} | claims
        assert {mount["name"] for mount in kind.container["volumeMounts"]} == volumes
    budgets = {one["metadata"]["name"]: one["spec"] for one in of_kind("PodDisruptionBudget")}
    assert set(budgets) == {f"llmos-{service}" for service in WORKLOADS}
    for name, budget in budgets.items():
        assert budget["selector"]["matchLabels"] == {"app.kubernetes.io/name": name}
        assert budget["maxUnavailable"] < WORKLOADS[name.removeprefix("llmos-")].document["spec"]["replicas"]
    schedulers = WORKLOADS["scheduler"].document["spec"]["replicas"]
    asked = WORKLOADS["gateway"].environment()["LLMOS_GATEWAY_SCHEDULERS"].split(",")
    assert asked == [f"llmos-scheduler-{n}.llmos-scheduler.llmos.svc:7000" for n in range(schedulers)]


def test_secrets_are_references_and_the_stream_key_is_the_gateways() -> None:
    assert not of_kind("Secret")
    readme = (DEPLOY / "README.md").read_text()
    for service, kind in WORKLOADS.items():
        secrets = {volume["secret"]["secretName"] for volume in kind.pod["volumes"] if "secret" in volume}
        assert ("llmos-stream-key" in secrets) == (service == "gateway")
        assert all(f"kubectl create secret generic {name} " in readme for name in secrets)
