"""What a worker's processes use, read from a made-up /proc."""

from __future__ import annotations

from pathlib import Path

from llmos.v1 import fleet_pb2
from worker.vitals import MOST_THREADS, Vitals


def process(proc: Path, pid: int, anon_kib: int, swap_kib: int, threads: int, files: int) -> None:
    fd = proc / str(pid) / "fd"
    fd.mkdir(parents=True)
    for number in range(files):
        (fd / str(number)).touch()
    status = (
        f"Name:\tpython\nVmRSS:\t 999999 kB\nRssAnon:\t  {anon_kib} kB\nVmSwap:\t{swap_kib} kB\nThreads:\t{threads}\n"
    )
    (proc / str(pid) / "status").write_text(status)


def test_the_sum_of_memory_and_threads_and_the_most_files(tmp_path: Path) -> None:
    process(tmp_path, 7, 100, 20, 3, 5)
    process(tmp_path, 8, 1000, 0, 4, 9)
    found = Vitals(2**30, lambda: (7, 8, None, 9), proc=tmp_path, files=64).measure()
    assert [(use.kind, use.used, use.limit) for use in found] == [
        (fleet_pb2.RESOURCE_KIND_MEMORY, 1120 * 1024, 2**30),
        (fleet_pb2.RESOURCE_KIND_FILES, 9, 64),
        (fleet_pb2.RESOURCE_KIND_THREADS, 7, MOST_THREADS),
    ]


def test_without_proc_nothing_is_said(tmp_path: Path) -> None:
    assert Vitals(2**30, lambda: (7,), proc=tmp_path).measure() == []
