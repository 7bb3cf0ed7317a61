"""Which processor a worker computes on: the main one, or one graphics processor. Without torch in this process."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata

from llmos.errors import ConfigError
from llmos.nvidia import driver_present
from worker import nvml

log = logging.getLogger(__name__)

_LOOK_S = 120.0
"""For a process that imports torch from a cold disk."""
_CUDA = re.compile(r"cuda(?::(\d+))?")
_PLACE = re.compile(r"(\d{1,6})/(\d{1,6})")
MODEL_SHARE = 0.9
"""Of a graphics processor's memory; the rest is for its driver, and for what else computes there."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which of a machine's workers this one is, from 0, and how many there are."""

    number: int = 0
    workers: int = 1

    @classmethod
    def parse(cls, text: str) -> Place:
        """From `2/4`, which counts from 1. Raises ConfigError."""
        match = _PLACE.fullmatch(text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(f"'{text}' says of no worker which one it is; write 2/4", param="place")
        return cls(int(match[1]) - 1, int(match[2]))


def choose(
    backend: str,
    device: str,
    place: Place = Place(),
    gpus: Callable[[], list[nvml.Gpu]] | None = None,
    usable: Callable[[], bool] | None = None,
) -> nvml.Gpu | None:
    """The graphics processor that `--device` means for a backend, with the memory for models; None: the main processor.

    `auto` and `cuda` deal those that the driver shows out to the machine's workers, in turn, `auto` only if torch can
    use them. Workers on one share it evenly. Raises ConfigError for one that is not there.
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
        return _dealt(found, place)
    number = int(match[1] or 0)
    if number >= len(found):
        raise ConfigError(f"'{device}': the driver shows {len(found)} graphics processors", param="device")
    if not (usable or torch_uses_cuda)():
        raise ConfigError(
            "this torch cannot use graphics processors: install a build for CUDA, or give --device cpu", param="device"
        )
    return _dealt(found, place) if match[1] is None else _part(found[number], place.workers)


def _dealt(found: list[nvml.Gpu], place: Place) -> nvml.Gpu:
    number = place.number % len(found)
    return _part(found[number], len(range(number, place.workers, len(found))))


def _part(gpu: nvml.Gpu, workers: int) -> nvml.Gpu:
    return replace(gpu, memory_bytes=int(gpu.memory_bytes * MODEL_SHARE) // workers)


def _listed() -> list[nvml.Gpu]:
    return list(nvml.gpus()) if driver_present() else []


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
