"""Where a model computes."""

from __future__ import annotations

import importlib.util
import os

import torch

from llmos.errors import ConfigError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
"""A workspace of fixed size, without which the library promises no equal bits. It reads this when it is first used."""


def select_device(name: str = "auto") -> torch.device:
    """`auto`: CUDA if torch sees a device, else the CPU; otherwise the device of that name. Raises ConfigError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device '{name}'; known: auto, cpu, cuda, cuda:N", param="device") from error
    if device.type == "cuda":
        _prepare_cuda(device)
    return device


def _prepare_cuda(device: torch.device) -> None:
    if not torch.cuda.is_available():
        raise ConfigError("torch sees no CUDA device here", param="device")
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("computing on CUDA needs Triton, which torch brings along on Linux", param="device")
    # Sums are float32, and the same every time.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    os.environ.setdefault(*_WORKSPACE)
    if device.index is not None:
        torch.cuda.set_device(device)
