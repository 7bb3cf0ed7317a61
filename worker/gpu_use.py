"""What the worker's processes hold of the memory of graphics processors, as NVML lists it; recorded and replayed.

`python -m worker.gpu_use --record FILE --seconds 60` writes one line of JSON for each look, which a worker on any other
machine replays with `--gpu-use-recording FILE`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

import msgspec

from llmos.errors import ConfigError
from llmos.nvidia import driver_present
from llmos.v1 import fleet_pb2

log = logging.getLogger(__name__)

_EVERY_S = 0.5
_MOST_LOOKS = 100_000


class GpuProcess(msgspec.Struct, frozen=True):
    """A process that computes on a processor."""

    pid: int
    """As the driver numbers it: in a container that may be another number than the process has here."""
    used: int
    """Bytes."""


class GpuUse(msgspec.Struct, frozen=True):
    """One processor's memory at one look."""

    uuid: str
    total: int
    processes: tuple[GpuProcess, ...] = ()


class Gauge(Protocol):
    """Looks at the processors once. May take milliseconds, or stand still with a broken driver."""

    def __call__(self) -> Sequence[GpuUse]:
        """As of now; empty where nothing can be said."""
        ...


def read(library: ModuleType) -> list[GpuUse]:
    """Every processor and who computes on it. A driver that does not answer has none."""
    try:
        library.nvmlInit()
    except library.NVMLError:
        return []
    try:
        return [_read(library, index) for index in range(library.nvmlDeviceGetCount())]
    except library.NVMLError:
        return []
    finally:
        library.nvmlShutdown()


def _read(library: ModuleType, index: int) -> GpuUse:
    handle = library.nvmlDeviceGetHandleByIndex(index)
    uuid = library.nvmlDeviceGetUUID(handle)
    found = library.nvmlDeviceGetComputeRunningProcesses(handle)
    return GpuUse(
        uuid=uuid.decode() if isinstance(uuid, bytes) else uuid,
        total=int(library.nvmlDeviceGetMemoryInfo(handle).total),
        # Some drivers know of a process and not of its memory.
        processes=tuple(GpuProcess(one.pid, int(one.usedGpuMemory)) for one in found if one.usedGpuMemory),
    )


class RecordedGauge:
    """Replays a recording, a look at a time; the last one stays."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if the file is no recording."""
        self._looks = list(_recorded(path))
        self._next = 0

    def __call__(self) -> Sequence[GpuUse]:
        """See `Gauge`."""
        look = self._looks[min(self._next, len(self._looks) - 1)]
        self._next += 1
        return look


def _recorded(path: Path) -> Iterator[tuple[GpuUse, ...]]:
    decoder = msgspec.json.Decoder(tuple[GpuUse, ...])
    try:
        lines = path.read_bytes().splitlines()
        if not 0 < len(lines) <= _MOST_LOOKS:
            raise ConfigError(f"the recording {path} has no looks, or more than {_MOST_LOOKS:,}")
        for line in lines:
            yield decoder.decode(line)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"cannot replay the recording {path}: {error}") from error


def local_gauge() -> Gauge | None:
    """The gauge of this machine; None where there is no driver."""
    if not driver_present():
        return None
    try:
        import pynvml
    except ModuleNotFoundError:
        return None
    return lambda: read(pynvml)


class GpuWatch:
    """Looks twice a second beside everything else: a driver that stands still holds up nobody."""

    def __init__(self, gauge: Gauge | None) -> None:
        """Without a gauge nothing is seen, and nothing done."""
        self._gauge = gauge
        self.last: Sequence[GpuUse] = ()
        """What the last look that came back has shown."""

    async def run(self) -> None:
        """Until cancelled, also where there is nothing to look at."""
        while True:
            if self._gauge is not None:
                self.last = await asyncio.to_thread(self._gauge)
            await asyncio.sleep(_EVERY_S)


def held(
    looks: Iterable[GpuUse], mine: Iterable[int | None], here: Callable[[int], bool]
) -> list[fleet_pb2.ResourceUse]:
    """What processes with these ids hold of each processor; `here` says whether a process of an id is seen from here.

    Drivers number processes as the host does. In a container none of ours is found by its number: if then just one
    process computes there and it is not seen from here, it is ours, as processors are not shared between containers.
    """
    known = {pid for pid in mine if pid is not None}
    found = []
    for look in looks:
        own = [one.used for one in look.processes if one.pid in known]
        if not own and len(look.processes) == 1 and not here(look.processes[0].pid):
            own = [look.processes[0].used]
        if own:
            kind = fleet_pb2.RESOURCE_KIND_GPU_MEMORY
            found.append(fleet_pb2.ResourceUse(kind=kind, device_id=look.uuid, used=sum(own), limit=look.total))
    return found


def main(argv: Sequence[str], gauge: Gauge | None = None) -> int:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(prog="python -m worker.gpu_use", description=__doc__)
    parser.add_argument("--record", type=Path, metavar="FILE", required=True, help="write the recording there")
    parser.add_argument("--seconds", type=float, default=60.0, help="for how long; a look every half second")
    options = parser.parse_args(argv)
    gauge = gauge or local_gauge()
    if gauge is None:
        sys.stderr.write("worker.gpu_use: this machine has no NVIDIA driver, or `nvidia-ml-py` is not installed\n")
        return 1
    looks = max(1, min(_MOST_LOOKS, round(options.seconds / _EVERY_S)))
    with options.record.open("wb") as file:
        for number in range(looks):
            file.write(msgspec.json.encode(tuple(gauge())) + b"\n")
            if number + 1 < looks:
                time.sleep(_EVERY_S)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
