"""The single writer: one task takes events from one bounded queue, asks the core, and has its commands carried out.

Commands of a batch of events are collected by their carriers and flushed once per batch: one message per gateway and
worker, however many requests it is about.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Protocol

from llmos.clock import Clock
from scheduler.commands import Command
from scheduler.core import Core
from scheduler.events import Event, Tick

log = logging.getLogger(__name__)

QUEUE_LIMIT = 4096
_BATCH = 256
_TICK_S = 0.05


class Carrier(Protocol):
    """Carries the core's commands into the world. Called by the loop only; must not block."""

    def carry(self, command: Command) -> None:
        """Begin to carry out one command."""
        ...

    def flush(self) -> None:
        """A batch is complete: send what has been collected."""
        ...


class Loop:
    """Owns the core. Others post events; reading the core's state between awaits is safe, as all share one thread."""

    def __init__(self, core: Core, carrier: Carrier, clock: Clock, *, limit: int = QUEUE_LIMIT) -> None:
        self.core = core
        self._carrier = carrier
        self._clock = clock
        self._limit = limit
        self._queue: deque[Event] = deque()
        self._filled = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self.errors = 0
        """Events on which the core raised: bugs. Each is logged; the loop goes on."""

    def __len__(self) -> int:
        return len(self._queue)

    async def post(self, event: Event) -> None:
        """Append an event; waits while the queue is full, which slows its sender down."""
        while len(self._queue) >= self._limit:
            self._room.clear()
            await self._room.wait()
        self.post_now(event)

    def post_now(self, event: Event) -> None:
        """Append an event that must not wait: ends of streams, ticks. There are few of those."""
        self._queue.append(event)
        self._filled.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._filled.wait()
            for _ in range(min(_BATCH, len(self._queue))):
                self._handle(self._queue.popleft())
            self._carrier.flush()
            if not self._queue:
                self._filled.clear()
            if len(self._queue) < self._limit:
                self._room.set()
            # Others get their turn even if the queue never runs empty.
            await asyncio.sleep(0)

    async def tick(self) -> None:
        """Let time pass for the core, until cancelled."""
        while True:
            await asyncio.sleep(_TICK_S)
            self.post_now(Tick())

    def _handle(self, event: Event) -> None:
        try:
            commands = self.core.handle(event, self._clock.monotonic())
        except Exception:
            # A bug must not take every stream of the fleet down, least of all on each leader in turn.
            self.errors += 1
            log.exception("the core failed on %s", type(event).__name__)
            return
        for command in commands:
            self._carrier.carry(command)
