"""The engine's own kernels for CPUs: a whole decode step of a Llama-shaped model, weights in int8, fp16 or fp32.

Written in C++ behind a plain C interface (`abi.h`), called through ctypes. A row's bits depend on its own tokens alone:
not on the batch, its place in it, the number of threads, prefill or decode, or the instruction set.
"""

from worker.kernels.binding import Isa, Kernels, Kind, available, load, reason

__all__ = ["Isa", "Kernels", "Kind", "available", "load", "reason"]
