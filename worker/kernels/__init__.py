"""The engine's own kernels for CPUs: a whole decode step of a Llama-shaped model, weights in int8, fp16 or fp32.

Written in C++ behind a plain C interface (`abi.h`), called through ctypes. A row's bits depend on its own tokens alone:
not on the batch, its place in it, the number of threads, prefill or decode, or the instruction set.

`build` and `library` need no torch; the names below do, and import it when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.kernels.binding import Isa, Kernels, Kind, available, load, present, reason

__all__ = ["Isa", "Kernels", "Kind", "available", "load", "present", "reason"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("worker.kernels.binding"), name)
