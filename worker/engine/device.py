"""Where a model computes."""

from __future__ import annotations

import torch

from llmos.errors import ConfigError


def select_device(name: str = "auto") -> torch.device:
    """`auto`: CUDA if torch sees a device, else the CPU; otherwise the device of that name. Raises ConfigError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device '{name}'; known: auto, cpu, cuda, cuda:N", param="device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch sees no CUDA device here", param="device")
    return device
