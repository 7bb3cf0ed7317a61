"""Everything a run makes outside its own memory is written down first, so that it can be undone, even by the next run.

One folder per fleet below the system's temporary folder, and beside it (a file system may be mounted on it) a list of
processes, control groups, mounts and network namespaces in the order in which they were made. `undo` takes them back in
reverse; `sweep` does it for runs whose process is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

HOME = Path(tempfile.gettempdir()) / "llmos-faults"
_PATIENCE_S = 5.0


class Ledger:
    """Owned by one run."""

    def __init__(self, name: str = "") -> None:
        self.folder = HOME / f"run-{os.getpid()}{name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = _list_of(self.folder)

    def note(self, kind: str, what: str | int) -> None:
        """About to make a `kind` (process, cgroup, mount, netns); of processes: have made."""
        entry: dict[str, object] = {"kind": kind, "what": what}
        if kind == "process":
            with contextlib.suppress(psutil.NoSuchProcess):
                entry["born"] = psutil.Process(int(what)).create_time()
        with self._path.open("a") as out:
            out.write(json.dumps(entry) + "\n")

    def undo(self) -> None:
        """Take everything back."""
        _undo(self.folder)


def _list_of(folder: Path) -> Path:
    return folder.with_suffix(".made")


def sweep() -> int:
    """Undo what runs that are no more have left; how many they were."""
    found = 0
    for folder in {path.with_suffix("") for path in HOME.glob("run-*")}:
        owner = folder.name.removeprefix("run-").split("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            _undo(folder)
            found += 1
    return found


def _undo(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        entries = [json.loads(line) for line in _list_of(folder).read_text().splitlines()]
        for entry in reversed(entries):
            _UNDO[entry["kind"]](entry)
    shutil.rmtree(folder, ignore_errors=True)
    _list_of(folder).unlink(missing_ok=True)


def _end_process(entry: dict[str, object]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(int(str(entry["what"])))
        if process.create_time() != entry.get("born"):
            return
        family = [process, *process.children(recursive=True)]
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
        psutil.wait_procs(family, timeout=_PATIENCE_S)


def _end_cgroup(entry: dict[str, object]) -> None:
    """Processes in it are moved out: ending them is not its job."""
    path = Path(str(entry["what"]))
    if not path.exists():
        return
    for pid in (path / "cgroup.procs").read_text().split():
        with contextlib.suppress(OSError):
            (path.parent / "cgroup.procs").write_text(pid)
    deadline = time.monotonic() + _PATIENCE_S
    while path.exists() and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            path.rmdir()
            return
        time.sleep(0.02)


def _end_mount(entry: dict[str, object]) -> None:
    subprocess.run(["umount", "-l", str(entry["what"])], capture_output=True, timeout=30, check=False)


def _end_netns(entry: dict[str, object]) -> None:
    subprocess.run(["ip", "netns", "del", str(entry["what"])], capture_output=True, timeout=30, check=False)


_UNDO = {"process": _end_process, "cgroup": _end_cgroup, "mount": _end_mount, "netns": _end_netns}
