"""An engine process that waits, started and empty, for the present one to end: importing torch takes seconds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass

from llmos.internal.v1 import work_pb2
from worker.engine_child import EngineChild, spawn
from worker.engine_process import EngineSetup

log = logging.getLogger(__name__)

_START_S = 300.0
"""For a process that imports torch and may compile the kernels."""
_PAUSE_S = 30.0
"""Between a spare that ended and the next one."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A process that has reported, and what it said."""

    child: EngineChild
    report: work_pb2.WorkerReport


class Spare:
    """Keeps at most one such process. `keep` runs beside the link until it is cancelled, which ends the process."""

    def __init__(self, setup: EngineSetup, after_s: float) -> None:
        """`after_s`: how long an engine must have run before a spare is started beside it."""
        self._setup = setup
        self._after_s = after_s
        self._wanted = asyncio.Event()
        self._taken = asyncio.Event()
        self._ready: Ready | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the spare, once it is ready."""
        return None if self._ready is None else self._ready.child.process.pid

    def want(self) -> None:
        """An engine runs: have a spare soon."""
        self._wanted.set()

    def take(self) -> Ready | None:
        """The spare, if one is ready; the caller owns it."""
        ready, self._ready = self._ready, None
        if ready is not None:
            self._wanted.clear()
            self._taken.set()
        return ready

    async def keep(self) -> None:
        """Start a spare whenever one is wanted."""
        while True:
            await self._wanted.wait()
            await asyncio.sleep(self._after_s)
            try:
                taken = await self._hold()
            except OSError as error:  # no process or no socket to be had: serving goes on without
                log.warning("a spare engine process cannot be started: %s", error)
                taken = False
            if not taken:
                log.warning("there is no spare engine process; the next one starts in %.0f s", _PAUSE_S)
                await asyncio.sleep(_PAUSE_S)

    async def _hold(self) -> bool:
        """Start one and keep it until it is taken. Returns whether it was; otherwise it has ended."""
        try:
            child = await spawn(self._setup)
        except OSError as error:
            log.warning("no spare engine process can be started: %s", error)
            return False
        reported = False
        try:
            first = await _first(child)
            if first is not None:
                self._ready, reported = Ready(child, first.report), True
                self._taken.clear()
                await _either(self._taken.wait(), child.process.wait())
            return reported and self._ready is None
        finally:
            if self._ready is not None or not reported:
                self._ready = None
                await child.end()


async def _first(child: EngineChild) -> work_pb2.AttachResponse | None:
    """What a process says first; None if it ends, or says nothing for too long."""
    try:
        async with asyncio.timeout(_START_S):
            return await child.receive()
    except TimeoutError:
        return None


async def _either(*works: Coroutine[None, None, object]) -> None:
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
