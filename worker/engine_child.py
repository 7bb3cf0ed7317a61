"""An engine process from the outside: start it, hear of its readiness, end it."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from dataclasses import dataclass

import msgspec

from llmos.children import Child, start
from llmos.internal.v1 import work_pb2
from worker import pipe
from worker.engine_process import EngineSetup

log = logging.getLogger(__name__)

_GRACE_S = 2.0
ENGINE = "worker.engine_process"
"""What runs as the engine: a module; the fault suite runs one of its own."""


@dataclass(slots=True)
class EngineChild:
    """A started process and our end of its socket. Whoever holds it must `end` it."""

    process: Child
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def receive(self) -> work_pb2.AttachResponse | None:
        """Its next message; None: the socket has ended. The first one is its report."""
        message = await pipe.receive(self.reader)
        return None if message is None else work_pb2.AttachResponse.FromString(message)

    async def end(self) -> int:
        """Let go of its socket, kill it if it stays. Returns its exit status; negative: the signal that ended it."""
        self.writer.close()
        try:
            async with asyncio.timeout(_GRACE_S):
                return await self.process.wait()
        except TimeoutError:
            log.warning("the engine process %d did not end by itself; killing it", self.process.pid)
        self.process.kill()
        return await self.process.wait()


async def spawn(setup: EngineSetup) -> EngineChild:
    """Start a process, which begins with `setup`."""
    ours, theirs = socket.socketpair()
    arguments = ["-m", ENGINE, str(theirs.fileno()), str(os.getpid())]
    try:
        process = start([sys.executable, *arguments], keep=[theirs.fileno()])
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    reader, writer = await asyncio.open_connection(sock=ours)
    writer.write(pipe.frame(msgspec.json.encode(setup)))
    return EngineChild(process, reader, writer)
