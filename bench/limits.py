"""The machine's limits, measured: memory reads per second, and integer multiply-adds per second.

A decode step of one sequence reads every weight once, so that reads bound it; a step of many sequences is bound by the
multiply-adds. Both limits are those of the bare instruction with nothing else to do (`limits.cpp`); no engine can
pass them, and none that also loads, scales and attends reaches them.
"""

from __future__ import annotations

import ctypes
import json
import math
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

READ_BYTES = 1 << 30
"""More than any cache holds."""
PASSES = 5
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


def decode_weights(folder: Path) -> int:
    """Weights that a decode step multiplies by, of a folder of safetensors: all matrices, an embedding only if tied."""
    count, tied = 0, True
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  no dictionary
                shape = file.get_slice(name).get_shape()
                count += math.prod(shape) if len(shape) == 2 else 0
                tied = tied and name != "lm_head.weight"
    config = json.loads((folder / "config.json").read_text())
    return count if tied else count - config["vocab_size"] * config["hidden_size"]
