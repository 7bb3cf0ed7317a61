"""Backends by name. torch is imported only for `torch`, and only in the engine process."""

from __future__ import annotations

import os
from typing import Literal

from llmos.clock import SystemClock
from llmos.errors import ConfigError, MissingExtra
from llmos.store.precision import Precision
from worker.backend import Backend

BackendName = Literal["echo", "torch"]


def create(
    name: str,
    *,
    threads: int,
    tokens_per_second: float,
    precision: Precision = "auto",
    load_s: float = 0.0,
    leak_bytes: int = 0,
    gpu: str = "",
) -> tuple[Backend, str]:
    """Make a backend and its numerics fingerprint. `gpu`: UUID of the graphics processor for `torch`; empty: the CPU.

    Raises MissingExtra without the `worker` extra for `torch`.
    """
    if name == "echo":
        from worker.backends import echo

        backend = echo.EchoBackend(tokens_per_second=tokens_per_second, load_s=load_s, leak_bytes=leak_bytes)
        return backend, echo.FINGERPRINT
    if name == "torch":
        return _torch(threads, precision, gpu)
    raise ConfigError(f"unknown backend '{name}'; known: echo, torch", param="backend")


def _torch(threads: int, precision: Precision, gpu: str) -> tuple[Backend, str]:
    if gpu:
        # The numbers of CUDA and of the driver's own library need not agree; a process that sees one has no such doubt.
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        from worker.backends.torch import TorchBackend
        from worker.engine.grammar.guard import Guard
        from worker.fingerprint import torch_fingerprint
    except ModuleNotFoundError as error:
        if error.name in ("torch", "transformers", "safetensors", "tokenizers", "numpy", "llguidance"):
            raise MissingExtra("worker", "The torch backend") from error
        raise
    device = "cuda" if gpu else "cpu"
    backend = TorchBackend(threads=threads, device=device, precision=precision, guard=Guard(SystemClock()))
    return backend, torch_fingerprint(backend.device, backend.precision, kernels=backend.kernels)
