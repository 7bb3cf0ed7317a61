"""What deploy/ holds is well-formed, and the services would accept its settings. No Docker engine needed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.config import GatewayConfig
from llmos.config import load
from llmos.healthcheck import HealthcheckConfig
from scheduler.config import SchedulerConfig
from worker.config import WorkerConfig

DEPLOY = Path(__file__).parents[2] / "deploy"
BIN = Path(sys.executable).parent
DOCKERFILES = sorted((DEPLOY / "docker").glob("*.Dockerfile"))
SECTIONS: dict[str, type] = {
    "gateway": GatewayConfig,
    "scheduler": SchedulerConfig,
    "worker": WorkerConfig,
    "healthcheck": HealthcheckConfig,
}


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    document = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return dict(document["services"])


def test_compose_follows_its_schema() -> None:
    done = run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_dockerfiles_pass_hadolint_run_as_nobody_and_pin_their_base(file: Path) -> None:
    done = run(BIN / "hadolint", file)
    assert done.returncode == 0, done.stdout
    text = file.read_text()
    assert re.search(r"^USER 10001:10001$", text, re.MULTILINE)
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert bases
    assert all(re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+(@sha256:[0-9a-f]{64})?", base) for base in bases)


def test_only_the_worker_image_has_torch() -> None:
    installs = {file.stem: re.findall(r"'\.\[(.*)\]'", file.read_text()) for file in DOCKERFILES}
    assert installs == {"gateway": ["gateway"], "scheduler": ["scheduler"], "worker": ["worker,store,certs"]}


@pytest.mark.parametrize("name", ["scheduler", "worker-1", "worker-2", "gateway"])
def test_services_accept_their_settings(services: dict[str, dict[str, Any]], name: str) -> None:
    environment = services[name]["environment"]
    sections = {variable.split("_")[1].lower() for variable in environment}
    assert sections == {name.split("-")[0], "healthcheck"}
    for section in sections:
        config = load(SECTIONS[section], section, environ=environment)
        assert config.tls.enabled


def test_etcd_is_current(services: dict[str, dict[str, Any]]) -> None:
    found = re.search(r"etcd:v(\d+)\.(\d+)\.(\d+)", services["etcd"]["image"])
    assert found
    version = tuple(int(part) for part in found.groups())
    assert version >= (3, 6, 14) or (3, 5, 33) <= version < (3, 6, 0)


def test_addresses_are_in_the_certificate(services: dict[str, dict[str, Any]]) -> None:
    hosts = set(re.findall(r"--host (\S+)", services["setup"]["command"][0]))
    addressed = {name for name in services if name not in ("setup", "collector")}
    assert hosts == addressed
