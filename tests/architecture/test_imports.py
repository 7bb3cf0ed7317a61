"""What an import loads, where the packages come from, and who may import whom."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "numpy", "tensorflow")


def modules_after(*names: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after importing `names`."""
    names_of = "sorted({m.split('.')[0] for m in sys.modules})"
    code = f"import sys, json, {', '.join(names)}; print(json.dumps({names_of}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("service", "siblings"),
    [
        ("gateway.__main__", ("scheduler", "worker")),
        ("scheduler.__main__", ("gateway", "worker")),
        ("worker.__main__", ("gateway", "scheduler")),
    ],
)
def test_a_service_loads_neither_torch_nor_a_sibling(service: str, siblings: tuple[str, ...]) -> None:
    loaded = modules_after(service)
    assert loaded.isdisjoint(HEAVY)
    assert loaded.isdisjoint(siblings)


def test_the_command_loads_no_heavy_module() -> None:
    loaded = modules_after("llmos.cli.main")
    assert loaded.isdisjoint({*HEAVY, "grpc", "google", "opentelemetry", "gateway", "scheduler", "worker"})


@pytest.mark.parametrize("package", ["llmos", "gateway", "scheduler", "worker"])
def test_packages_come_from_this_checkout(package: str) -> None:
    code = f"import {package}; print({package}.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=60, check=True)
    assert Path(done.stdout.strip()).resolve().is_relative_to(ROOT)


def test_import_contracts_hold() -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([str(linter)], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout
