"""What a worker holds of graphics processors' memory: matched, recorded, replayed; without any such processor."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast

import msgspec
import pytest

from llmos.errors import ConfigError
from llmos.v1 import fleet_pb2
from tests.unit.worker.test_vitals import process
from worker import gpu_use
from worker.gpu_use import GpuProcess, GpuUse, GpuWatch, RecordedGauge, held, main
from worker.vitals import Vitals

GIB = 2**30


def look(*processes: tuple[int, int], uuid: str = "GPU-1") -> GpuUse:
    return GpuUse(uuid, 80 * GIB, tuple(GpuProcess(pid, used) for pid, used in processes))


def used(looks: list[GpuUse], *mine: int | None, here: tuple[int, ...] = ()) -> list[tuple[str, int]]:
    return [(use.device_id, use.used) for use in held(looks, mine, lambda pid: pid in here)]


def test_what_our_processes_hold_is_summed_for_each_processor() -> None:
    looks = [look((7, GIB), (8, 2 * GIB), (99, 50 * GIB)), look((8, GIB), uuid="GPU-2"), look((99, GIB), uuid="GPU-3")]
    assert used(looks, 7, 8, None, here=(7, 8, 99)) == [("GPU-1", 3 * GIB), ("GPU-2", GIB)]


def test_in_a_container_the_only_process_is_ours_under_another_number() -> None:
    assert used([look((4711, GIB))], 7) == [("GPU-1", GIB)]
    assert used([look((4711, GIB))], 7, here=(4711,)) == [], "somebody else here"
    assert used([look((4711, GIB), (4712, GIB))], 7) == [], "nobody knows whose"


def nvml(fail: bool = False) -> ModuleType:
    class NVMLError(Exception):
        pass

    def init() -> None:
        if fail:
            raise NVMLError

    calls: list[str] = []
    return cast(
        "ModuleType",
        SimpleNamespace(
            NVMLError=NVMLError,
            calls=calls,
            nvmlInit=init,
            nvmlShutdown=lambda: calls.append("shutdown"),
            nvmlDeviceGetCount=lambda: 1,
            nvmlDeviceGetHandleByIndex=lambda index: index,
            nvmlDeviceGetUUID=lambda handle: b"GPU-1",
            nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=80 * GIB),
            nvmlDeviceGetComputeRunningProcesses=lambda handle: [
                SimpleNamespace(pid=7, usedGpuMemory=GIB),
                SimpleNamespace(pid=8, usedGpuMemory=None),
            ],
        ),
    )


def test_nvml_is_asked_and_a_driver_that_does_not_answer_has_nothing() -> None:
    library = nvml()
    assert gpu_use.read(library) == [look((7, GIB))]
    assert library.calls == ["shutdown"]
    assert gpu_use.read(nvml(fail=True)) == []


def test_a_recording_is_made_and_replayed_and_its_last_look_stays(tmp_path: Path) -> None:
    looks = [[look((4711, number * GIB))] for number in (1, 2)]
    file = tmp_path / "gpus.jsonl"
    assert main(["--record", str(file), "--seconds", "0.1"], lambda: looks[0]) == 0
    with file.open("ab") as more:
        more.write(msgspec.json.encode(looks[1]) + b"\n")
    gauge = RecordedGauge(file)
    assert [[one.processes[0].used for one in gauge()] for _ in range(3)] == [[GIB], [2 * GIB], [2 * GIB]]


@pytest.mark.parametrize("text", ["", "{}", '[{"uuid": 1}]', "[[]]"])
def test_what_is_no_recording_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "gpus.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError):
        RecordedGauge(file)


def test_it_is_said_with_the_other_vitals(tmp_path: Path) -> None:
    process(tmp_path, 7, 100, 0, 3, 5)
    *_, last = Vitals(GIB, lambda: (7,), proc=tmp_path, files=64, gpus=lambda: [look((4711, 5))]).measure()
    assert (last.kind, last.device_id, last.used, last.limit) == (
        fleet_pb2.RESOURCE_KIND_GPU_MEMORY, "GPU-1", 5, 80 * GIB
    )  # fmt: skip


async def test_a_driver_that_stands_still_holds_up_nobody() -> None:
    stuck, inside = threading.Event(), threading.Event()

    def gauge() -> list[GpuUse]:
        inside.set()
        stuck.wait(10)
        return [look((7, 1))]

    watch = GpuWatch(gauge)
    task = asyncio.create_task(watch.run())
    assert await asyncio.to_thread(inside.wait, 10)
    assert watch.last == ()
    stuck.set()
    async with asyncio.timeout(10):
        while not watch.last:  # noqa: ASYNC110 - a thread decides
            await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
