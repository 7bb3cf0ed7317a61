"""What a measurement was taken on: processor, memory, versions. No names of hosts, users or folders."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path

FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "sve",
)
"""Instruction sets that decide which kernels an engine runs."""
PACKAGES = ("torch", "transformers", "numpy")


def describe(versions: Iterable[str] = ()) -> list[str]:
    """Lines for people; `versions` are those of the sides, and what else is told of the run."""
    cpu, present = _cpu(), features()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return [
        f"processor: {cpu.get('model name', platform.machine())}, {len(os.sched_getaffinity(0))} cores",
        f"instruction sets: {', '.join(present) or 'baseline'}",
        f"memory: {memory:.0f} GiB",
        f"software: Python {platform.python_version()}, {', '.join(packages)}",
        *([f"run: {'; '.join(versions)}"] if versions else []),
    ]


def features() -> list[str]:
    """Those of `FEATURES` that this processor has."""
    cpu = _cpu()
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    return [name for name in FEATURES if name in flags]


def vllm_dtype() -> str:
    """The type in which vLLM is fastest here: bfloat16 only where the processor multiplies it."""
    return "bfloat16" if {"avx512_bf16", "amx_bf16"} & set(features()) else "float32"


def _cpu(path: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """The first processor's entry; empty where the system has no such file."""
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
