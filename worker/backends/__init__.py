"""Backends by name. torch is imported only for `torch`, and only in the engine process."""

from __future__ import annotations

from typing import Literal

from llmos.clock import SystemClock
from llmos.errors import ConfigError, MissingExtra
from llmos.store.precision import Precision
from worker.backend import Backend

BackendName = Literal["echo", "torch"]
USES_GPUS: dict[BackendName, bool] = {"echo": True, "torch": False}
"""Whether models go to a graphics processor by default, where there is one."""


def create(
    name: str,
    *,
    threads: int,
    tokens_per_second: float,
    precision: Precision = "auto",
    load_s: float = 0.0,
    leak_bytes: int = 0,
) -> tuple[Backend, str]:
    """Make a backend and its numerics fingerprint. Raises MissingExtra without the `worker` extra for `torch`."""
    if name == "echo":
        from worker.backends import echo

        backend = echo.EchoBackend(tokens_per_second=tokens_per_second, load_s=load_s, leak_bytes=leak_bytes)
        return backend, echo.FINGERPRINT
    if name == "torch":
        return _torch(threads, precision)
    raise ConfigError(f"unknown backend '{name}'; known: echo, torch", param="backend")


def _torch(threads: int, precision: Precision) -> tuple[Backend, str]:
    try:
        from worker.backends.torch import TorchBackend
        from worker.engine.grammar.guard import Guard
        from worker.fingerprint import torch_fingerprint
    except ModuleNotFoundError as error:
        if error.name in ("torch", "transformers", "safetensors", "tokenizers", "numpy", "llguidance"):
            raise MissingExtra("worker", "The torch backend") from error
        raise
    backend = TorchBackend(threads=threads, precision=precision, guard=Guard(SystemClock()))
    return backend, torch_fingerprint(precision=backend.precision, kernels=backend.kernels)
