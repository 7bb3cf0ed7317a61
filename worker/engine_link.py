"""The RPC process's side of the engine process: start it, talk to it, notice its end, start it again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from llmos.clock import Clock
from llmos.errors import SetupError, Unavailable
from llmos.internal.v1 import work_pb2
from worker import pipe
from worker.engine_process import EXIT_SETUP, EngineSetup

log = logging.getLogger(__name__)

_BACKOFF_FIRST_S, _BACKOFF_LAST_S = 0.1, 10.0
_STEADY_S = 30.0
"""An engine that lived this long starts the backoff anew."""
_FALSE_STARTS = 5
"""Ends before the first sign of life after which starting again is given up."""
_GRACE_S = 2.0
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


@dataclass(slots=True)
class _Child:
    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class EngineLink:
    """One engine process at a time. `run` supervises it until it is cancelled; `close` ends it."""

    def __init__(self, setup: EngineSetup, listener: EngineListener, *, clock: Clock, rng: random.Random) -> None:
        self._setup = setup
        self._listener = listener
        self._clock = clock
        self._rng = rng
        self._child: _Child | None = None
        self.ready = asyncio.Event()
        """Set while an engine process waits for commands."""
        self._was_ready = False
        self.restarts = 0
        """Engine processes that ended without being asked to."""

    @property
    def pid(self) -> int | None:
        """Process id of the engine, if there is one."""
        return None if self._child is None else self._child.process.pid

    async def run(self) -> None:
        """Keep an engine process running. Raises SetupError if the backend cannot exist here, or never starts."""
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
            await _end(child)

    async def _live(self) -> int:
        """Run one engine process to its end. Returns its exit status; negative: the signal that ended it."""
        child = self._child = await _spawn(self._setup)
        try:
            await self._read(child)
        finally:
            self.ready.clear()
        # The socket ended first: a process that still exists is of no use without it.
        status = await _end(child)
        self._child = None
        return status

    async def _read(self, child: _Child) -> None:
        while (message := await pipe.receive(child.reader)) is not None:
            response = work_pb2.AttachResponse.FromString(message)
            if response.HasField("report"):
                self.ready.set()
                self._was_ready = True
                self._listener.engine_ready(response.report)
            else:
                self._listener.engine_frame(response.frame)


async def _spawn(setup: EngineSetup) -> _Child:
    ours, theirs = socket.socketpair()
    arguments = ["-m", "worker.engine_process", str(theirs.fileno()), str(os.getpid())]
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdin=asyncio.subprocess.DEVNULL, pass_fds=[theirs.fileno()]
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    reader, writer = await asyncio.open_connection(sock=ours)
    writer.write(pipe.frame(msgspec.json.encode(setup)))
    return _Child(process, reader, writer)


async def _end(child: _Child) -> int:
    child.writer.close()
    try:
        async with asyncio.timeout(_GRACE_S):
            return await child.process.wait()
    except TimeoutError:
        log.warning("the engine process %d did not end by itself; killing it", child.process.pid)
    with contextlib.suppress(ProcessLookupError):  # it ended in between
        child.process.kill()
    return await child.process.wait()


def _describe(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"
