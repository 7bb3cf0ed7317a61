"""Limits of control groups, versions 1 and 2."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmos import cgroups
from llmos.cgroups import Limits
from llmos.fleet import options

GIB = 2**30


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_cgroup_v2_takes_the_tightest_parent(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "fs",
        {
            "pod/memory.max": str(4 * GIB),
            "pod/cpu.max": "150000 100000",
            "pod/worker/memory.max": "max",
            "pod/worker/cpu.max": "max 100000",
        },
    )
    membership = tree(tmp_path, {"cgroup": "0::/pod/worker"}) / "cgroup"
    assert cgroups.read(root, membership) == Limits(4 * GIB, 1.5)


def test_cgroup_v1_in_a_container_reads_the_mounted_root(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "fs",
        {
            "memory/memory.limit_in_bytes": str(2 * GIB),
            "cpu/cpu.cfs_quota_us": "50000",
            "cpu/cpu.cfs_period_us": "100000",
        },
    )
    text = "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/"
    membership = tree(tmp_path, {"cgroup": text}) / "cgroup"
    assert cgroups.read(root, membership) == Limits(2 * GIB, 0.5)


def test_cgroup_v1_without_limits(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "fs",
        {
            "memory/memory.limit_in_bytes": "9223372036854771712",
            "cpu/cpu.cfs_quota_us": "-1",
            "cpu/cpu.cfs_period_us": "100000",
        },
    )
    membership = tree(tmp_path, {"cgroup": "4:memory:/\n2:cpu:/"}) / "cgroup"
    assert cgroups.read(root, membership) == Limits()


def test_no_control_groups_at_all(tmp_path: Path) -> None:
    assert cgroups.read(tmp_path, tmp_path / "none") == Limits()


@pytest.mark.parametrize(
    ("quota", "usable", "whole"), [(0.0, 8.0, 8), (0.5, 0.5, 1), (1.0, 1.0, 1), (2.5, 2.5, 2), (64.0, 8.0, 8)]
)
def test_a_quota_bounds_the_processors(
    monkeypatch: pytest.MonkeyPatch, quota: float, usable: float, whole: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    limits = Limits(cpu_cores=quota)
    assert (cgroups.usable_cores(limits), cgroups.whole_cores(limits)) == (usable, whole)


def test_an_embedded_fleet_shares_what_its_groups_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(cgroups, "read", lambda: Limits(1000, 2.0))
    assert (options.usable_cores(), options.free_memory()) == (2, 1000)
