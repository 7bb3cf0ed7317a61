"""A fresh install without the worker extra: gateway and scheduler start, torch is not there."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.fakes.etcd_server import EtcdServer
from tests.fakes.fleet import ROOT, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Outcome of a command."""
    argv, env = [str(part) for part in command], {**os.environ, **environment}
    return subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with `llmos[gateway,scheduler]` installed from a copy of the tracked files."""
    folder = tmp_path_factory.mktemp("install")
    (folder / "source").mkdir()
    copied = run("bash", "-c", f"git ls-files -z | xargs -0 cp --parents -t {folder / 'source'}", cwd=ROOT)
    assert copied.returncode == 0, copied.stderr
    venv.create(folder / "venv", with_pip=False)
    python, source = folder / "venv" / "bin" / "python", folder / "source"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile"]
    # Nothing here needs the kernels: without a compiler on the path they are not built.
    done = run(*pip, "-c", source / "constraints.txt", f"{source}[gateway,scheduler]", cwd=folder, PATH="")
    assert done.returncode == 0, done.stderr
    return python


@pytest.mark.parametrize("module", ["torch", "transformers", "numpy"])
def test_heavy_modules_are_absent(python: Path, module: str) -> None:
    done = run(python, "-c", f"import {module}", cwd=Path("/"))
    assert f"No module named '{module}'" in done.stderr


def test_scheduler_and_gateway_start(python: Path, tmp_path: Path) -> None:
    with EtcdServer(tmp_path / "etcd") as etcd:
        ready = {name: tmp_path / f"{name}.json" for name in ("scheduler", "gateway")}
        flags = {
            "scheduler": ["--etcd-endpoints", etcd.address],
            "gateway": ["--schedulers", "127.0.0.1:1"],
        }
        started = [
            subprocess.Popen([python, "-m", name, "--ready-file", ready[name], *flags[name]], cwd=tmp_path)
            for name in ready
        ]
        try:
            for name, file in ready.items():
                wait_for(file.exists, f"{name} to start")
        finally:
            for process in started:
                process.terminate()
        assert [process.wait(30) for process in started] == [0, 0]


def test_importing_a_gguf_says_what_to_install(python: Path, tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF" + bytes(64))
    store = tmp_path / "store"
    command = [str(python), "-m", "llmos.cli.main", "models", "import", str(model)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env={"LLMOS_STORE": str(store)}
    )
    assert done.returncode == 1
    assert "llmos[worker]" in done.stderr
    assert sys.executable not in done.stderr
