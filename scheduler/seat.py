"""Whether this scheduler leads, and the reign if it does. Services look here; the election decides here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from llmos.errors import InternalError, NotLeader
from scheduler.reign import Reign

log = logging.getLogger(__name__)


class ReignSeat:
    """At most one reign at a time. Implements `scheduler.leadership.Seat`."""

    def __init__(self, begin: Callable[[int], Reign]) -> None:
        self.reign: Reign | None = None
        self.leader_address = ""
        """host:port of the other scheduler that leads; empty if none is known, or this one does."""
        self._begin = begin
        self._task: asyncio.Task[None] | None = None
        self._failed = asyncio.Event()

    async def elected(self, term: int) -> None:
        """See `Seat`."""
        self.leader_address = ""
        if self.reign is not None:
            self.reign.raise_term(term)
            return
        self.reign = self._begin(term)
        self._task = asyncio.create_task(self.reign.run(), name=f"reign-{term}")
        self._task.add_done_callback(self._ended)

    async def deposed(self, leader_address: str) -> None:
        """See `Seat`."""
        self.leader_address = leader_address
        if self.reign is not None:
            self.reign.leader_address = leader_address
        await self.close()

    async def close(self) -> None:
        """End the reign, if there is one."""
        task, self._task, self.reign = self._task, None, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    def leading(self) -> Reign:
        """The reign. Raises NotLeader."""
        if self.reign is None:
            raise NotLeader("This scheduler does not lead.", leader_address=self.leader_address)
        return self.reign

    async def failure(self) -> None:
        """Wait until a reign ends by itself, which is a bug, then raise it: better no scheduler than half of one."""
        await self._failed.wait()
        raise InternalError("the reign ended unexpectedly")

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            log.error("the reign ended by itself", exc_info=task.exception())
            self._failed.set()
