"""Totals: measured, limited, replayed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import psutil
import pytest

from llmos.cgroups import Limits
from llmos.errors import ConfigError
from llmos.v1 import fleet_pb2
from worker import nvml
from worker.nvml import Gpu
from worker.probe import MODEL_SHARE, HostProbe, NvmlProbe, RecordedProbe, local_probe, main

RECORDINGS = Path(__file__).parents[2] / "fakes" / "recordings"
GIB = 2**30


def host(tmp_path: Path, memory_limit: int = 0, limits: Limits = Limits()) -> HostProbe:  # noqa: B008 - frozen
    return HostProbe(tmp_path / "not" / "there" / "yet", memory_limit, lambda: limits)


def test_a_host_without_limits_shows_what_the_machine_has(tmp_path: Path) -> None:
    capacity = host(tmp_path).measure()
    assert capacity.memory_bytes == psutil.virtual_memory().total
    assert capacity.cpu_cores >= 1
    assert capacity.disk_bytes > 0
    (cpu,) = capacity.devices
    assert (cpu.id, cpu.kind) == ("cpu", fleet_pb2.DEVICE_KIND_CPU)
    assert cpu.memory_bytes == int(capacity.memory_bytes * MODEL_SHARE)


@pytest.mark.parametrize(("flag", "group", "memory"), [(GIB, 0, GIB), (GIB, GIB // 2, GIB // 2), (0, GIB, GIB)])
def test_the_tightest_limit_counts(tmp_path: Path, flag: int, group: int, memory: int) -> None:
    capacity = host(tmp_path, flag, Limits(group, 0.5)).measure()
    assert capacity.memory_bytes == memory
    assert capacity.cpu_cores == 0.5


@pytest.mark.parametrize("alone", [True, False])
def test_gpus_stand_before_the_processors_or_alone(tmp_path: Path, alone: bool) -> None:
    found = [Gpu("GPU-1", "Big", 80 * GIB), Gpu("GPU-2", "Big", 80 * GIB)]
    capacity = NvmlProbe(host(tmp_path), lambda: found, alone).measure()
    ids = [device.id for device in capacity.devices]
    assert ids == ["GPU-1", "GPU-2", *([] if alone else ["cpu"])]
    gpu = next(device for device in capacity.devices if device.id == "GPU-2")
    assert (gpu.kind, gpu.name, gpu.memory_bytes) == (fleet_pb2.DEVICE_KIND_GPU, "Big", 80 * GIB)


def test_without_gpus_models_go_to_the_main_processor(tmp_path: Path) -> None:
    assert [device.id for device in NvmlProbe(host(tmp_path), list, alone=True).measure().devices] == ["cpu"]


@pytest.mark.parametrize(("gpus", "ids"), [([], ["cpu"]), ([Gpu("GPU-2", "Big", GIB)], ["GPU-2"])])
def test_only_what_is_computed_on_is_offered(tmp_path: Path, gpus: list[Gpu], ids: list[str]) -> None:
    assert [device.id for device in local_probe(tmp_path, gpus=gpus).measure().devices] == ids


@pytest.mark.parametrize(("name", "gigabytes"), [("gpu-24gb", 24), ("gpu-80gb", 80)])
def test_recordings_replay(name: str, gigabytes: int) -> None:
    capacity = RecordedProbe(RECORDINGS / f"{name}.json").measure()
    assert capacity.devices[0].kind == fleet_pb2.DEVICE_KIND_GPU
    assert capacity.devices[0].memory_bytes // 10**9 in (gigabytes + 1, gigabytes + 5)
    assert {device.kind for device in capacity.devices} == {fleet_pb2.DEVICE_KIND_GPU, fleet_pb2.DEVICE_KIND_CPU}


def test_no_device_of_the_small_recording_takes_40_gib() -> None:
    devices = RecordedProbe(RECORDINGS / "gpu-24gb.json").measure().devices
    assert max(device.memory_bytes for device in devices) < 40 * GIB


def test_a_recording_is_made_and_replayed(tmp_path: Path) -> None:
    file = tmp_path / "recording.json"
    assert main(["--record", str(file), "--disk", str(tmp_path)]) == 0
    assert RecordedProbe(file).measure().memory_bytes > 0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"surprise": 1}', '{"cpu_cores": "many"}', "\xff"])
def test_what_is_no_recording_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "recording.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError):
        RecordedProbe(file).measure()


def test_a_missing_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        RecordedProbe(tmp_path / "none.json").measure()


@dataclass
class FakeNvml:
    """The calls of pynvml that are used."""

    cards: list[tuple[str | bytes, str | bytes, int]]
    broken: bool = False
    closed: bool = False
    NVMLError = RuntimeError

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name
        if self.broken:
            raise self.NVMLError("driver not loaded")

    def nvmlShutdown(self) -> None:  # noqa: N802 - NVML's name
        self.closed = True

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802 - NVML's name
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802 - NVML's name
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str | bytes:  # noqa: N802 - NVML's name
        return self.cards[handle][0]

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:  # noqa: N802 - NVML's name
        return self.cards[handle][1]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802 - NVML's name
        return SimpleNamespace(total=self.cards[handle][2])


def test_nvml_lists_cards_whatever_text_it_speaks() -> None:
    library = FakeNvml([("GPU-1", "New", 24 * GIB), (b"GPU-2", b"Old", 16 * GIB)])
    found = nvml.list_gpus(cast(ModuleType, library))
    assert found == [Gpu("GPU-1", "New", 24 * GIB), Gpu("GPU-2", "Old", 16 * GIB)]
    assert library.closed


def test_a_driver_that_does_not_answer_is_no_card() -> None:
    assert nvml.list_gpus(cast(ModuleType, FakeNvml([], broken=True))) == []


def test_a_driver_that_gives_up_half_way_is_no_card() -> None:
    library = FakeNvml([("GPU-1", "New", 24 * GIB)])
    library.nvmlDeviceGetMemoryInfo = Mock(side_effect=library.NVMLError("not supported"))  # type: ignore[method-assign]
    assert nvml.list_gpus(cast(ModuleType, library)) == []
    assert library.closed


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ["GPU-aa", "GPU-ab", "GPU-b"]),
        ("", []),
        ("-1", []),
        ("2,0", ["GPU-b", "GPU-aa"]),
        ("GPU-ab", ["GPU-ab"]),
        ("0,7,1", ["GPU-aa"]),
        ("GPU-a", []),
        ("1,1", ["GPU-ab"]),
    ],
)
def test_cuda_visible_devices_chooses(value: str | None, shown: list[str]) -> None:
    cards = [Gpu(uuid, "x", GIB) for uuid in ("GPU-aa", "GPU-ab", "GPU-b")]
    environ = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert [gpu.uuid for gpu in nvml.visible(cards, environ)] == shown
