"""Which processor a worker computes on: the main one, or one graphics processor. Without torch in this process."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec

from llmos.errors import ConfigError
from llmos.nvidia import driver_present, torch_may_use_them
from worker import nvml

log = logging.getLogger(__name__)

_TRIAL_S = 180.0
"""For a process that imports torch from a cold disk and compiles kernels."""
_MESSAGE_CHARS = 1000
_CUDA = re.compile(r"cuda(?::(\d+))?")
_PLACE = re.compile(r"(\d{1,6})/(\d{1,6})")
CARD_SHARE = 0.9
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
    gpus: Callable[[], Sequence[nvml.Gpu]] | None = None,
    usable: Callable[[], Sequence[str]] | None = None,
) -> nvml.Gpu | None:
    """The graphics processor that `--device` means for a backend, with the memory for models; None: the main processor.

    `auto` and `cuda` deal those that can be used out to the machine's workers, in turn; without one `auto` is the main
    processor. Workers on one share it evenly. Raises ConfigError for one that is not there or cannot be used.
    """
    match = _CUDA.fullmatch(device)
    if match is None and device not in ("auto", "cpu"):
        raise ConfigError(f"unknown device '{device}'; known: auto, cpu, cuda, cuda:N", param="device")
    if backend != "torch" or device == "cpu":
        return None
    shown = (gpus or _listed)()
    if not shown:
        _go_without("the driver shows no graphics processor", device)
        return None
    found = _in_order(shown, (usable or usable_cards)())
    if not found:
        _go_without(f"torch cannot compute on the graphics processor that is here ({shown[0].name})", device)
        return None
    number = None if match is None or match[1] is None else int(match[1])
    if number is None:
        return _dealt(found, place)
    if number >= len(found):
        raise ConfigError(f"'{device}': torch can compute on {len(found)} graphics processors here", param="device")
    return _part(found[number], place.workers)


def _go_without(reason: str, device: str) -> None:
    if device != "auto":
        raise ConfigError(f"{reason}: give --device cpu, or see docs/operations.md", param="device")
    log.info("on the CPU: %s", reason)


def _in_order(shown: Sequence[nvml.Gpu], uuids: Sequence[str]) -> Sequence[nvml.Gpu]:
    """Those of `uuids`, which torch writes without the driver's prefix, in torch's order."""
    found = [gpu for uuid in uuids for gpu in shown if uuid and gpu.uuid.endswith(uuid)]
    return found or (shown if uuids else ())


def _dealt(found: Sequence[nvml.Gpu], place: Place) -> nvml.Gpu:
    number = place.number % len(found)
    return _part(found[number], len(range(number, place.workers, len(found))))


def _part(gpu: nvml.Gpu, workers: int) -> nvml.Gpu:
    return replace(gpu, memory_bytes=int(gpu.memory_bytes * CARD_SHARE) // workers)


def _listed() -> Sequence[nvml.Gpu]:
    return nvml.gpus() if driver_present() else ()


def usable_cards() -> Sequence[str]:
    """UUIDs of the processors that torch computes on, in its order. A process of its own tries, for some seconds."""
    if not torch_may_use_them():
        return ()
    try:
        tried = subprocess.run(
            [sys.executable, "-m", "worker.engine.cuda.trial"], capture_output=True, timeout=_TRIAL_S, check=False
        )
    except subprocess.TimeoutExpired:
        log.warning("torch has not said within %.0f s whether it can use graphics processors", _TRIAL_S)
        return ()
    if tried.stderr:
        log.warning("trial of the graphics processors: %s", tried.stderr.decode(errors="replace")[-_MESSAGE_CHARS:])
    try:
        return msgspec.json.decode(tried.stdout, type=tuple[str, ...])
    except msgspec.MsgspecError:
        return ()
