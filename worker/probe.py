"""Measures what a worker has: totals per device, processors, memory, disk.

`python -m worker.probe` prints them as JSON; `--record FILE` writes a recording, which a worker on any other machine
replays with `--probe-recording FILE`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
from google.protobuf import json_format

from llmos import cgroups
from llmos.errors import ConfigError
from llmos.nvidia import driver_present
from llmos.v1 import fleet_pb2
from worker import nvml

MODEL_SHARE = 0.9
"""Of the main memory that the worker may use; the rest is for its processes."""


class Probe(Protocol):
    """Measures a worker's totals."""

    def measure(self) -> fleet_pb2.Capacity:
        """Totals as of now. Bytes; `devices` is never empty."""
        ...


@dataclass(frozen=True, slots=True)
class HostProbe:
    """Processors, main memory and disk, within what control groups and `memory_limit` leave of them."""

    disk_path: Path
    """Free space is measured where this lies, or will lie."""
    memory_limit: int = 0
    """Bytes; 0: no limit but the host's and its control groups'."""
    limits: Callable[[], cgroups.Limits] = cgroups.read

    def measure(self) -> fleet_pb2.Capacity:
        """See `Probe`. The one device is `cpu`."""
        limits = self.limits()
        bounds = [psutil.virtual_memory().total, limits.memory_bytes, self.memory_limit]
        memory = min(bound for bound in bounds if bound)
        cpu = fleet_pb2.Device(
            id="cpu",
            kind=fleet_pb2.DEVICE_KIND_CPU,
            name=_processor_name(),
            memory_bytes=int(memory * MODEL_SHARE),
        )
        return fleet_pb2.Capacity(
            devices=[cpu],
            cpu_cores=cgroups.usable_cores(limits),
            memory_bytes=memory,
            disk_bytes=_free_disk(self.disk_path),
        )


@dataclass(frozen=True, slots=True)
class NvmlProbe:
    """The host's totals and its NVIDIA processors."""

    host: Probe
    gpus: nvml.Gpus
    alone: bool = False
    """Models go to the graphics processors only; else to the main one too, where those are full."""

    def measure(self) -> fleet_pb2.Capacity:
        """See `Probe`."""
        capacity = self.host.measure()
        found = [
            fleet_pb2.Device(id=gpu.uuid, kind=fleet_pb2.DEVICE_KIND_GPU, name=gpu.name, memory_bytes=gpu.memory_bytes)
            for gpu in self.gpus()
        ]
        devices = found if found and self.alone else [*found, *capacity.devices]
        del capacity.devices[:]
        capacity.devices.extend(devices)
        return capacity


@dataclass(frozen=True, slots=True)
class RecordedProbe:
    """Replays a recording."""

    path: Path

    def measure(self) -> fleet_pb2.Capacity:
        """See `Probe`. Raises ConfigError if the file is not a recording."""
        try:
            capacity = json_format.Parse(self.path.read_text(encoding="utf-8"), fleet_pb2.Capacity())
        except (OSError, UnicodeDecodeError, json_format.ParseError) as error:
            raise ConfigError(f"cannot replay the probe recording {self.path}: {error}") from error
        if not capacity.devices:
            raise ConfigError(f"the probe recording {self.path} names no device")
        return capacity


def local_probe(disk_path: Path, *, memory_limit: int = 0, gpus: Sequence[nvml.Gpu] | None = None) -> Probe:
    """The probe for this machine. `gpus`: where all models go, none: the main processor; unset: whatever there is."""
    host = HostProbe(disk_path, memory_limit)
    if gpus is not None:
        return NvmlProbe(host, lambda: gpus, alone=True) if gpus else host
    return NvmlProbe(host, nvml.gpus) if driver_present() else host


def record(capacity: fleet_pb2.Capacity) -> str:
    """A recording's text: protobuf's JSON."""
    return json_format.MessageToJson(capacity, preserving_proto_field_name=True, indent=2) + "\n"


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def _free_disk(path: Path) -> int:
    """Of the file system that holds `path`, or its nearest parent that exists."""
    existing = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    return int(psutil.disk_usage(str(existing)).free)


def main(argv: Sequence[str]) -> int:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(prog="python -m worker.probe", description=__doc__)
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the recording there")
    parser.add_argument("--disk", type=Path, default=Path(), metavar="PATH", help="where models will lie")
    options = parser.parse_args(argv)
    text = record(local_probe(options.disk).measure())
    if options.record is None:
        sys.stdout.write(text)
    else:
        options.record.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
