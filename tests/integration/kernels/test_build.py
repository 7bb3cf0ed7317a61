"""Compiling at first use: where, when, and what is said if it cannot be done."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from worker.kernels import Kernels, abi, build


def test_a_library_in_the_cache_is_used_as_it_is(tmp_path: Path) -> None:
    present = tmp_path / build.library_name()
    present.write_bytes(b"")
    assert build.library_path(tmp_path, compiler="/does/not/exist") == present


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match="does not start"):
        build.library_path(tmp_path, compiler="/does/not/exist")
    assert not list(tmp_path.glob("*.so"))


def test_a_failing_compiler_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match="failed"):
        build.library_path(tmp_path, compiler="false")
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_no_compiler_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler"):
        build.library_path(tmp_path)


def test_a_folder_that_cannot_be_written_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(build.BuildError, match="cannot be written"):
        build.library_path(tmp_path / "file" / "below")


def test_the_cache_lies_in_the_users_cache_folder() -> None:
    assert build.default_cache({"XDG_CACHE_HOME": "/x"}) == Path("/x/llmos/kernels")
    assert build.default_cache({"XDG_CACHE_HOME": "relative"}) == Path.home() / ".cache/llmos/kernels"


def test_without_a_library_torch_serves_and_the_reason_is_said_once(tmp_path: Path) -> None:
    program = (
        "import logging; logging.basicConfig(format='%(message)s')\n"
        "from worker import kernels\n"
        "assert not kernels.available() and not kernels.available()\n"
        "print(kernels.reason())\n"
    )
    environment = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(Path.cwd())}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert "no C++ compiler" in result.stdout
    assert result.stderr.count("own kernels are not used") == 1


def test_the_library_has_no_function_of_one_instruction_set_for_all(loaded: Kernels) -> None:
    """Only the interface is visible; all else could be mixed up with another object's."""
    library = ctypes.CDLL(str(build.library_path()))
    assert library.llk_abi() == abi.ABI
    with pytest.raises(AttributeError):
        _ = library.team_run
    assert os.path.basename(library._name) == build.library_name()  # noqa: PTH119
