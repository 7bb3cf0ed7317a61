"""What only root can do to a process: control groups of version 1 or 2, a small file system."""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path

from tests.faults.ledger import Ledger

_ROOT = Path("/sys/fs/cgroup")
_PERIOD_US = 100_000
_numbers = itertools.count()


class ControlGroup:
    """Processes with a bound on memory, or on processor time. Made on first use, gone with the ledger."""

    def __init__(self, ledger: Ledger, controller: str) -> None:
        """`controller` is `memory` or `cpu`. Raises OSError without the right to make one."""
        self._controller = controller
        self._version_1 = (_ROOT / controller).is_dir()
        parent = _ROOT / controller if self._version_1 else _ROOT
        self.path = parent / f"llmos-faults-{os.getpid()}-{next(_numbers)}"
        ledger.note("cgroup", str(self.path))
        if not self._version_1:
            (parent / "cgroup.subtree_control").write_text(f"+{controller}")
        self.path.mkdir()

    def limit_memory(self, size: int) -> None:
        """Bytes; past them the kernel kills."""
        name = "memory.limit_in_bytes" if self._version_1 else "memory.max"
        (self.path / name).write_text(str(size))

    def limit_cpu(self, share: float) -> None:
        """So much of one processor."""
        quota = max(1000, int(share * _PERIOD_US))
        if self._version_1:
            (self.path / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (self.path / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (self.path / "cpu.max").write_text(f"{quota} {_PERIOD_US}")

    def take(self, pid: int) -> None:
        """Move a process in; what it makes later counts."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def release(self) -> None:
        """Move everything out again."""
        for pid in (self.path / "cgroup.procs").read_text().split():
            (self.path.parent / "cgroup.procs").write_text(pid)


class SmallDisk:
    """A file system in memory of `size` bytes, at `path`."""

    def __init__(self, ledger: Ledger, path: Path, size: int) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        ledger.note("mount", str(path))
        options = f"size={size},mode=0755"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(path)], check=True, timeout=30)

    def fill(self) -> int:
        """Write until nothing more fits; how many bytes."""
        written = 0
        with (self.path / "ballast").open("wb", buffering=0) as out:
            try:
                while True:
                    written += out.write(bytes(65536))
            except OSError:
                return written

    def clear(self) -> None:
        """Take back what `fill` wrote."""
        (self.path / "ballast").unlink(missing_ok=True)
