"""Questions to the core that somebody waits on: an event goes in, and the command that answers it comes out."""

from __future__ import annotations

import asyncio
import itertools

from llmos.errors import NotFound, Unavailable
from llmos.internal.v1 import journal_pb2
from scheduler.commands import AnswerTakeUp
from scheduler.events import TakeUpAsked
from scheduler.loop import Loop

_SETTLES_S = 1.0
"""When to ask again; a leader settles within about three times that."""


class Inquiries:
    """Owned by one reign. A question whose asker is gone is forgotten."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._calls = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[AnswerTakeUp]] = {}

    async def take_up(self, tenant: str, origin_ids: tuple[str, ...]) -> journal_pb2.JournalEntry:
        """What the journal has of a stream, with a claim to it. Raises NotFound, and Unavailable until that is sure."""
        call = next(self._calls)
        answer: asyncio.Future[AnswerTakeUp] = asyncio.get_running_loop().create_future()
        self._waiting[call] = answer
        try:
            await self._loop.post(TakeUpAsked(call, tenant, origin_ids))
            said = await answer
        finally:
            del self._waiting[call]
        if said.entry is not None:
            return said.entry
        if not said.settled:
            raise Unavailable(
                "The scheduler has just begun and does not know all streams yet.", retry_after_s=_SETTLES_S
            )
        raise NotFound("Nothing is remembered of such a stream: it may be over for too long.")

    def answer(self, command: AnswerTakeUp) -> None:
        """Carry out the command."""
        waiting = self._waiting.get(command.call)
        if waiting is not None and not waiting.done():
            waiting.set_result(command)
