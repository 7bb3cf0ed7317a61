"""Real worker processes, and the signals that tests send them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

WAIT_S = 60.0
_COUNT = itertools.count()


@dataclass(slots=True)
class WorkerProcess:
    """`python -m worker`, once it serves."""

    process: asyncio.subprocess.Process
    id: str
    port: int
    log_file: Path

    @property
    def address(self) -> str:
        """host:port of its Work service."""
        return f"127.0.0.1:{self.port}"

    @property
    def engine_pid(self) -> int:
        """Its engine process."""
        children = psutil.Process(self.process.pid).children()
        return next(child.pid for child in children if "worker.engine_process" in child.cmdline())

    def log(self) -> str:
        """What it has logged so far, its engine included."""
        return self.log_file.read_text()

    def signal(self, number: signal.Signals) -> None:
        """Signal the RPC process alone."""
        os.kill(self.process.pid, number)

    async def exit_status(self) -> int:
        """Wait for its end."""
        async with asyncio.timeout(WAIT_S):
            return await self.process.wait()


@contextlib.asynccontextmanager
async def worker_process(folder: Path, *flags: str) -> AsyncIterator[WorkerProcess]:
    """Start a worker and wait until it serves. Killed at the end, if it still runs."""
    ready = folder / f"ready-{next(_COUNT)}.json"
    log_file = ready.with_suffix(".log")
    with log_file.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "worker", "--ready-file", str(ready), *flags, stdout=log, stderr=log
        )
    try:
        await until(lambda: ready.exists() or process.returncode is not None)
        assert process.returncode is None, log_file.read_text()
        announced = json.loads(ready.read_text())
        assert announced["pid"] == process.pid
        yield WorkerProcess(process, announced["id"], announced["port"], log_file)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def until(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    """Wait for a condition outside of this process."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - other processes set no event here
            await asyncio.sleep(0.01)


def gone(pid: int) -> bool:
    """Whether the process has ended; one that nobody reaped counts as ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
