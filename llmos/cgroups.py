"""Limits that Linux control groups put on this process: version 1 and 2, containers included.

See the kernel's `cgroup-v2.rst` and `cgroup-v1/`. A limit of a parent group binds its children too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 2**60
"""Version 1 writes "no limit" as the largest multiple of a page."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the groups allow; 0: no limit."""

    memory_bytes: int = 0
    cpu_cores: float = 0.0


def read(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Limits:
    """The tightest limits of this process's groups and their parents. No limits where there are no groups."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return Limits()
    memory: list[int] = []
    cores: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            for folder in _upwards(root, path):
                memory.extend(_number(folder / "memory.max"))
                cores.extend(_quota_v2(folder / "cpu.max"))
        if "memory" in controllers.split(","):
            for folder in _upwards(root / "memory", path):
                memory.extend(_number(folder / "memory.limit_in_bytes"))
        if "cpu" in controllers.split(","):
            for folder in _upwards(root / "cpu", path):
                cores.extend(_quota_v1(folder))
    return Limits(min(memory, default=0), min(cores, default=0.0))


def usable_cores(limits: Limits) -> float:
    """Processors that this process can keep busy: those that it may run on, within its groups' quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(float(allowed), limits.cpu_cores or float("inf"))


def whole_cores(limits: Limits) -> int:
    """Threads that can compute at once without waiting for each other; at least 1."""
    return max(1, int(usable_cores(limits)))


def _upwards(base: Path, path: str) -> Iterator[Path]:
    """The group's folder and its parents. In a container the path may lie outside of the mount: the root is left."""
    folder = base / path.lstrip("/")
    while folder != base and base in folder.parents:
        yield folder
        folder = folder.parent
    yield base


def _number(file: Path) -> list[int]:
    text = _text(file)
    return [int(text)] if text.isdecimal() and 0 < int(text) < _UNLIMITED else []


def _quota_v2(file: Path) -> list[float]:
    quota, _, period = _text(file).partition(" ")
    return [int(quota) / int(period)] if quota.isdecimal() and period.isdecimal() else []


def _quota_v1(folder: Path) -> list[float]:
    quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    return [int(quota) / int(period)] if quota.isdecimal() and period.isdecimal() else []


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
