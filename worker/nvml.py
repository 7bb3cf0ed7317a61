"""NVIDIA processors as NVML shows them. The library is imported only where a driver is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

from llmos.config import environment
from llmos.errors import MissingExtra


@dataclass(frozen=True, slots=True)
class Gpu:
    """Totals of one processor."""

    uuid: str
    name: str
    memory_bytes: int


Gpus = Callable[[], Sequence[Gpu]]
"""Lists the processors that this process may use."""


def gpus() -> Sequence[Gpu]:
    """The processors that `CUDA_VISIBLE_DEVICES` leaves, in its order. Raises MissingExtra without `nvidia-ml-py`."""
    try:
        import pynvml
    except ModuleNotFoundError as error:
        raise MissingExtra("worker", "Measuring NVIDIA processors") from error
    return visible(list_gpus(pynvml), environment())


def list_gpus(library: ModuleType) -> list[Gpu]:
    """Every processor in NVML's order. A driver that does not answer counts as no processor."""
    try:
        library.nvmlInit()
    except library.NVMLError:
        return []
    try:
        handles = [library.nvmlDeviceGetHandleByIndex(index) for index in range(library.nvmlDeviceGetCount())]
        return [
            Gpu(
                uuid=_text(library.nvmlDeviceGetUUID(handle)),
                name=_text(library.nvmlDeviceGetName(handle)),
                memory_bytes=int(library.nvmlDeviceGetMemoryInfo(handle).total),
            )
            for handle in handles
        ]
    except library.NVMLError:
        return []
    finally:
        library.nvmlShutdown()


def visible(found: Sequence[Gpu], environ: Mapping[str, str]) -> list[Gpu]:
    """What CUDA will show: indices or the beginnings of UUIDs, up to the first that matches nothing."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return list(found)
    shown: list[Gpu] = []
    for entry in (part.strip() for part in chosen.split(",")):
        matching = [gpu for index, gpu in enumerate(found) if entry and (str(index) == entry or _begins(gpu, entry))]
        if len(matching) != 1 or matching[0] in shown:
            break
        shown.append(matching[0])
    return shown


def _begins(gpu: Gpu, entry: str) -> bool:
    return entry.startswith("GPU-") and gpu.uuid.startswith(entry)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
