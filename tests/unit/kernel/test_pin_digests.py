"""`deploy/pin-digests` writes what the registry says, all of it or nothing. A stand-in for `docker` is the registry."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[3] / "deploy"
DIGEST = "sha256:" + "ab" * 32


@pytest.fixture
def deploy(tmp_path: Path) -> Path:
    """A copy of deploy/ that the script may change."""
    return Path(shutil.copytree(DEPLOY, tmp_path / "deploy"))


def pin(deploy: Path, answer: str) -> subprocess.CompletedProcess[str]:
    commands = deploy.parent / "bin"
    commands.mkdir(exist_ok=True)
    docker = commands / "docker"
    docker.write_text(f"#!/bin/sh\n{answer}\n")
    docker.chmod(0o755)
    environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}"}
    return subprocess.run([deploy / "pin-digests"], env=environment, capture_output=True, text=True, timeout=30)


def froms(deploy: Path) -> list[str]:
    files = sorted((deploy / "docker").glob("*.Dockerfile"))
    return [line for file in files for line in file.read_text().splitlines() if line.startswith("FROM")]


def test_every_image_is_pinned_and_a_second_run_changes_nothing(deploy: Path) -> None:
    done = pin(deploy, f"echo {DIGEST}")
    assert done.returncode == 0, done.stderr
    assert froms(deploy)
    assert all(f"@{DIGEST}" in line for line in froms(deploy))
    images = [line for line in (deploy / "compose.yaml").read_text().splitlines() if line.strip().startswith("image:")]
    assert all("llmos-" in line or f"@{DIGEST}" in line for line in images)
    before = froms(deploy)
    assert pin(deploy, f"echo {DIGEST}").returncode == 0
    assert froms(deploy) == before


@pytest.mark.parametrize("answer", ["exit 1", "echo nonsense"])
def test_an_image_that_cannot_be_resolved_changes_nothing(deploy: Path, answer: str) -> None:
    before = froms(deploy)
    assert pin(deploy, answer).returncode == 1
    assert froms(deploy) == before
