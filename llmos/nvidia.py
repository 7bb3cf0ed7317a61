"""Whether NVIDIA's processors might be used here. Everything else about them is the workers' business."""

from __future__ import annotations

import ctypes
from importlib import metadata

_LIBRARIES = ("libnvidia-ml.so.1", "nvml.dll")


def driver_present() -> bool:
    """Whether NVML's library, a part of the driver, can be loaded."""
    for library in _LIBRARIES:
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return True
    return False


def torch_may_use_them() -> bool:
    """Whether there is a torch that is not built for the main processor alone. Without importing it."""
    try:
        return not metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False


def may_use_cards(device: str) -> bool:
    """Whether workers started with that `--device` might compute on graphics processors."""
    return device != "cpu" and torch_may_use_them() and driver_present()
