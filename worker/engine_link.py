"""The RPC process's side of the engine process: start it, talk to it, notice its end, start it again."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable
from typing import Protocol

from llmos.clock import Clock
from llmos.errors import SetupError, Unavailable
from llmos.internal.v1 import work_pb2
from worker import pipe
from worker.engine_child import EngineChild, spawn
from worker.engine_process import EXIT_SETUP, EngineSetup
from worker.engine_spare import Spare

log = logging.getLogger(__name__)

_BACKOFF_FIRST_S, _BACKOFF_LAST_S = 0.1, 10.0
_STEADY_S = 30.0
"""An engine that lived this long starts the backoff anew."""
_FALSE_STARTS = 5
"""Ends before the first sign of life after which starting again is given up."""
_BUFFER_BYTES = 64 * 1024 * 1024
"""Commands that an engine may leave unread before it counts as hung for new ones."""


class EngineListener(Protocol):
    """Who hears of the engine. Called in the event loop; must not block."""

    def engine_ready(self, report: work_pb2.WorkerReport) -> None:
        """A fresh engine process waits for commands; no model is loaded."""
        ...

    def engine_frame(self, frame: work_pb2.WorkFrame) -> None:
        """One step's result. The listener owns the message."""
        ...

    def engine_lost(self, reason: str) -> None:
        """The engine process is gone, and with it every attempt and model."""
        ...


class EngineLink:
    """One engine process at a time. `run` supervises it until it is cancelled; `close` ends it."""

    def __init__(
        self,
        setup: EngineSetup,
        listener: EngineListener,
        *,
        clock: Clock,
        rng: random.Random,
        spare_after_s: float | None = None,
    ) -> None:
        """`spare_after_s`: seconds after which an engine gets a spare beside it; None: it never does."""
        self._setup = setup
        self._spare = None if spare_after_s is None else Spare(setup, spare_after_s)
        self._listener = listener
        self._clock = clock
        self._rng = rng
        self._child: EngineChild | None = None
        self.ready = asyncio.Event()
        """Set while an engine process waits for commands."""
        self._was_ready = False
        self.restarts = 0
        """Engine processes that ended without being asked to."""

    @property
    def spare_pid(self) -> int | None:
        """Process id of the spare, once there is one."""
        return None if self._spare is None else self._spare.pid

    @property
    def pid(self) -> int | None:
        """Process id of the engine, if there is one."""
        return None if self._child is None else self._child.process.pid

    async def run(self) -> None:
        """Keep an engine process running. Raises SetupError if the backend cannot exist here, or never starts."""
        keeper = None if self._spare is None else asyncio.create_task(self._spare.keep())
        try:
            await self._supervise()
        finally:
            if keeper is not None:
                keeper.cancel()
                await asyncio.gather(keeper, return_exceptions=True)

    async def _supervise(self) -> None:
        backoff_s = _BACKOFF_FIRST_S
        while True:
            started = self._clock.monotonic()
            status = await self._live()
            if status == EXIT_SETUP or (self.restarts >= _FALSE_STARTS and not self._was_ready):
                raise SetupError(f"the {self._setup.backend} engine cannot start; the log above says why")
            self.restarts += 1
            if self._clock.monotonic() - started > _STEADY_S:
                backoff_s = _BACKOFF_FIRST_S
            log.error("the engine process ended (%s); starting it again in %.1f s", _describe(status), backoff_s)
            self._listener.engine_lost(_describe(status))
            await asyncio.sleep(backoff_s * self._rng.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, _BACKOFF_LAST_S)

    def send(self, commands: Iterable[work_pb2.Command]) -> None:
        """Hand commands over, without waiting. Raises Unavailable if no engine takes them now."""
        child = self._child
        if child is None or not self.ready.is_set():
            raise Unavailable("The engine is starting.")
        if child.writer.transport.get_write_buffer_size() > _BUFFER_BYTES:
            raise Unavailable("The engine does not take commands.")
        batch = work_pb2.AttachRequest(commands=commands)
        child.writer.write(pipe.frame(batch.SerializeToString()))

    async def close(self) -> None:
        """End the engine process: let go of its socket, then kill it if it stays. `run` must be cancelled first."""
        child, self._child = self._child, None
        self.ready.clear()
        if child is not None:
            await child.end()

    async def _live(self) -> int:
        """Run one engine process to its end. Returns its exit status; negative: the signal that ended it."""
        spare = None if self._spare is None else self._spare.take()
        child = self._child = await spawn(self._setup) if spare is None else spare.child
        try:
            if spare is not None:
                self._begin(spare.report)
            while (message := await child.receive()) is not None:
                if message.HasField("report"):
                    self._begin(message.report)
                else:
                    self._listener.engine_frame(message.frame)
        finally:
            self.ready.clear()
        # The socket ended first: a process that still exists is of no use without it.
        status = await child.end()
        self._child = None
        return status

    def _begin(self, report: work_pb2.WorkerReport) -> None:
        self.ready.set()
        self._was_ready = True
        self._listener.engine_ready(report)
        if self._spare is not None:
            self._spare.want()


def _describe(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"
