"""The stubs are what the contracts say, and the contracts pass buf."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUF = Path(sys.executable).parent / "buf"


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=100)


def test_regenerated_stubs_equal_the_checked_in_ones(tmp_path: Path) -> None:
    done = run(sys.executable, ROOT / "protos" / "generate.py", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*_pb2*")}
    assert len(fresh) == 4 * len(list((ROOT / "protos" / "llmos").rglob("*.proto")))
    for name, text in fresh.items():
        assert (ROOT / name).read_text() == text, f"{name} is stale: run `make protos`"
    folders = (ROOT / "llmos" / "v1", ROOT / "llmos" / "internal")
    checked_in = {path.relative_to(ROOT) for folder in folders for path in folder.rglob("*_pb2*.py*")}
    assert {name for name in checked_in if "__pycache__" not in name.parts} == set(fresh)


def test_the_contracts_pass_lint_and_format() -> None:
    lint = run(BUF, "lint", cwd=ROOT / "protos")
    assert lint.returncode == 0, lint.stdout
    formatted = run(BUF, "format", "--diff", "--exit-code", cwd=ROOT / "protos")
    assert formatted.returncode == 0, formatted.stdout


def test_the_contracts_break_no_earlier_one() -> None:
    baseline = ROOT / "protos" / "baseline.binpb"
    broken = run(BUF, "breaking", "--against", baseline, cwd=ROOT / "protos")
    assert broken.returncode == 0, broken.stdout


def test_buf_would_notice_a_break(tmp_path: Path) -> None:
    """The check above can fail: a contract with a field renumbered does."""
    done = run("cp", "-r", ROOT / "protos", tmp_path / "protos")
    assert done.returncode == 0
    contract = tmp_path / "protos" / "llmos" / "v1" / "inference.proto"
    text = contract.read_text()
    assert "uint64 seed = 7;" in text
    contract.write_text(text.replace("uint64 seed = 7;", "uint64 seed = 9;"))
    broken = run(BUF, "breaking", "--against", ROOT / "protos" / "baseline.binpb", cwd=tmp_path / "protos")
    assert broken.returncode != 0
    assert "seed" in broken.stdout
