"""An import that is killed at any stage leaves nothing half, and the next one goes on."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmos.store import Store
from tests.fakes.models import gguf_header

GGUF = gguf_header({"general.architecture": "llama"}) + b"weights"
ROOT = Path(__file__).parents[3]
IMPORTER = """
import os, signal, sys
from pathlib import Path
from llmos.store import Store, import_model, importer
from tests.fakes.models import write_model
from tests.fakes.store import Recorder

store, source, stage, converted = sys.argv[1:]

class Dying(Recorder):
    def stage(self, label, total, *, in_bytes=True):
        super().stage(label, total)
        if label.split()[0] == stage and len(self.stages) > 1:
            os.kill(os.getpid(), signal.SIGKILL)

def convert(gguf, out, progress):
    with open(converted, "a") as file:
        file.write("once\\n")
    progress.stage("converting", 1, in_bytes=False)
    write_model(out.with_name("partial"))
    out.with_name("partial").rename(out)

importer.convert, importer.require_converter = convert, lambda: None
if stage == "linking":
    importer.files.place = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if stage == "naming":
    importer.files.write_atomic = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
print(import_model(Store(Path(store)), source, progress=Dying()).version)
"""


def run(tmp_path: Path, stage: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "tiny.gguf").write_bytes(GGUF)
    arguments = [str(tmp_path / "store"), str(tmp_path / "tiny.gguf"), stage, str(tmp_path / "converted")]
    command = [sys.executable, "-c", IMPORTER, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("stage", ["converting", "hashing", "linking", "naming"])
def test_after_a_kill_nothing_half_is_visible_and_the_next_import_succeeds(tmp_path: Path, stage: str) -> None:
    killed = run(tmp_path, stage)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    store = Store(tmp_path / "store")
    assert store.list() == []
    for path in (store.path / "blobs").rglob("*"):
        assert path.is_dir() or hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    finished = run(tmp_path, "none")
    assert finished.returncode == 0, finished.stderr
    entry = store.resolve("tiny")
    assert entry.version == finished.stdout.strip()
    store.verify(entry)
    conversions = (tmp_path / "converted").read_text().count("once")
    assert conversions == (2 if stage == "converting" else 1)
    assert list((store.path / "staging").iterdir()) == []


def test_two_processes_at_once_make_one_version(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(GGUF)
    arguments = [str(tmp_path / "store"), str(tmp_path / "tiny.gguf"), "none", str(tmp_path / "converted")]
    command = [sys.executable, "-c", IMPORTER, *arguments]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    versions = {importer.communicate(timeout=60)[0].strip() for importer in both}
    assert [importer.returncode for importer in both] == [0, 0]
    store = Store(tmp_path / "store")
    assert versions == {store.resolve("tiny").version}
    store.verify(store.resolve("tiny"))
    assert (tmp_path / "converted").read_text() == "once\n"
