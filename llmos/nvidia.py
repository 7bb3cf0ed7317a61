"""Whether there is a driver for NVIDIA's processors. Everything else about them is the workers' business."""

from __future__ import annotations

import ctypes

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
