"""The package as it is built: with the kernels where there is a compiler, without them elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from worker.kernels.build import find_compiler

pytestmark = [pytest.mark.slow, pytest.mark.torch, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
_USE = (
    "import sys, torch\n"
    "from worker import kernels\n"
    "assert kernels.__file__.startswith(sys.argv[1]), kernels.__file__\n"
    "assert kernels.present() is not None\n"
    "packed = kernels.load().pack(torch.ones(16, 64), kind=kernels.Kind.FP32)\n"
    "print(float(kernels.load().product(packed, torch.ones(1, 64))[0, 0]))\n"
)


def _wheel(folder: Path, **environment: str) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    source = folder / "source"
    leave_out = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("llmos", "gateway", "scheduler", "worker"):
        shutil.copytree(ROOT / name, source / name, ignore=leave_out)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    subprocess.run(command, env={**os.environ, **environment}, check=True, timeout=150)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.mark.long
def test_a_wheel_brings_the_kernels(tmp_path: Path) -> None:
    if find_compiler() is None:
        pytest.skip("no compiler here")
    # Unoptimised, it takes a third of the time.
    wheel = _wheel(tmp_path, CXXFLAGS="-O0")
    assert "-py3-none-linux" in wheel.name
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    # Neither a compiler nor a cache: the kernels can only come from the wheel.
    environment = {"PATH": "", "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-c", _USE, str(tmp_path / "installed")]
    used = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert used.stdout == "64.0\n"
    assert not (tmp_path / "cache").exists()


def test_without_a_compiler_a_wheel_brings_the_sources(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    wheel = _wheel(tmp_path, PATH=str(tmp_path / "empty"))
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "worker/kernels/step.cpp" in names and "worker/kernels/abi.h" in names
    assert not [name for name in names if name.endswith(".so")]
