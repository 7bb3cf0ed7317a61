"""The machine's limits, measured: memory reads per second, and integer multiply-adds per second; what a token takes.

A decode step of one sequence reads every weight once, so that reads bound it; a step of many sequences is bound by the
multiply-adds. Both limits are those of the bare instruction with nothing else to do (`limits.cpp`); no engine can
pass them, and none that also loads, scales and attends reaches them.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from llmos.store.precision import HEAD

READ_BYTES = 1 << 30
"""More than any cache holds."""
PASSES = 5
BYTES_PER_WEIGHT = {"int8": 1 + 2 / 64, "fp16": 2.0, "fp32": 4.0}
"""int8 has a 16-bit scale per 64 weights."""
_HEADS = ("lm_head.weight", "model.embed_tokens.weight")
_ROLES = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv") | dict.fromkeys(("gate_proj", "up_proj"), "gate_up")
_ROLES |= {"o_proj": "out", "down_proj": "down"}
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")


class NoCompiler(Exception):
    """The limits cannot be measured without a C++ compiler."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates over all threads."""

    read_bytes: float
    """Bytes read from memory per second."""
    int16: float
    """Multiply-adds of 16-bit integers into 32-bit sums per second."""
    int8: float
    """Multiply-adds of 8-bit integers into 32-bit sums per second."""


class Meter:
    """The compiled loops. Raises NoCompiler."""

    def __init__(self) -> None:
        compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            raise NoCompiler("Measuring the machine's limits needs a C++ compiler (c++, g++ or clang++).")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "limits.so"
            subprocess.run(
                [compiler, *_FLAGS, str(Path(__file__).with_name("limits.cpp")), "-o", str(path)], check=True
            )
            self._library = ctypes.CDLL(str(path))
        for name in ("read_bytes", "int16_multiply_adds", "int8_multiply_adds"):
            getattr(self._library, f"limit_{name}_per_second").restype = ctypes.c_double

    def measure(self, threads: int) -> Limits:
        """All of them, in about two seconds."""
        read = self._library.limit_read_bytes_per_second(threads, ctypes.c_size_t(READ_BYTES), PASSES)
        int16 = self._library.limit_int16_multiply_adds_per_second(threads)
        return Limits(read, int16, self._library.limit_int8_multiply_adds_per_second(threads))


def matrices(folder: Path) -> dict[str, int]:
    """Weights that a decode step multiplies by, of a folder of safetensors, by the plan's name of their matrix.

    An embedding counts only if it is the output layer too.
    """
    found: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  no dictionary
                shape = file.get_slice(name).get_shape()
                if len(shape) == 2:
                    found[name] = math.prod(shape)
    head = next(found.pop(name) for name in _HEADS if name in found)
    for name in _HEADS:
        found.pop(name, None)
    named = {HEAD: head}
    for name, count in found.items():
        number, role = name.split(".")[2], _ROLES[name.split(".")[-2]]
        named[f"layers.{number}.{role}"] = named.get(f"layers.{number}.{role}", 0) + count
    return named
