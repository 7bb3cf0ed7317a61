"""The size budget: what grows past it is split, not argued for."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE_LINES = 400
FUNCTION_LINES = 50
FORBIDDEN_NAMES = {"utils.py", "helpers.py", "common.py"}


def sources() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    names = [ROOT / name for name in listed.stdout.split()]
    return [path for path in names if path.exists() and not path.stem.endswith(("_pb2", "_pb2_grpc"))]


def long_functions(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for node in functions
        if (node.end_lineno or node.lineno) - node.lineno + 1 > FUNCTION_LINES
    ]


def test_there_is_something_to_measure() -> None:
    assert len(sources()) > 50


def test_no_file_is_too_long() -> None:
    too_long = [str(path.relative_to(ROOT)) for path in sources() if len(path.read_text().splitlines()) > FILE_LINES]
    assert too_long == []


def test_no_function_is_too_long() -> None:
    assert [name for path in sources() for name in long_functions(path)] == []


@pytest.mark.parametrize("name", sorted(FORBIDDEN_NAMES))
def test_no_module_is_a_junk_drawer(name: str) -> None:
    assert [path for path in sources() if path.name == name] == []
