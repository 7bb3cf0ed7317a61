"""Which processor a worker computes on: the main one, or one graphics processor. Without torch in this process."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata

from llmos.errors import ConfigError
from worker import nvml

log = logging.getLogger(__name__)

_LOOK_S = 120.0
"""For a process that imports torch from a cold disk."""
_CUDA = re.compile(r"cuda(?::(\d+))?")


def choose(
    backend: str,
    device: str,
    gpus: Callable[[], list[nvml.Gpu]] | None = None,
    usable: Callable[[], bool] | None = None,
) -> nvml.Gpu | None:
    """The graphics processor that `--device` means for a backend; None: the main processor.

    `auto` is the first one that the driver shows if torch can use it. Raises ConfigError for one that is not there.
    """
    if backend != "torch" or device == "cpu":
        return None
    match = _CUDA.fullmatch(device)
    if match is None and device != "auto":
        raise ConfigError(f"unknown device '{device}'; known: auto, cpu, cuda, cuda:N", param="device")
    found = (gpus or _listed)()
    if match is None:
        if not found:
            return None
        if not (usable or torch_uses_cuda)():
            log.warning("there is a graphics processor (%s), but this torch cannot use it: on the CPU", found[0].name)
            return None
        return found[0]
    number = int(match[1] or 0)
    if number >= len(found):
        raise ConfigError(f"'{device}': the driver shows {len(found)} graphics processors", param="device")
    if not (usable or torch_uses_cuda)():
        raise ConfigError(
            "this torch cannot use graphics processors: install a build for CUDA, or give --device cpu", param="device"
        )
    return found[number]


def _listed() -> list[nvml.Gpu]:
    return list(nvml.gpus()) if nvml.driver_present() else []


def torch_uses_cuda() -> bool:
    """Whether the installed torch is built for CUDA and finds a device. Asks a process of its own, for some seconds."""
    try:
        if metadata.version("torch").endswith("+cpu"):
            return False
    except metadata.PackageNotFoundError:
        return False
    question = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    try:
        return subprocess.run([sys.executable, "-c", question], timeout=_LOOK_S, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        log.warning("torch has not said within %.0f s whether it can use CUDA", _LOOK_S)
        return False
