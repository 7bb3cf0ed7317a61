"""Connections of clients to gateways, and how they are lost."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from tests.sim.nodes import SimGateway
from tests.sim.orders import Break


class Gone(Exception):
    """The gateway's process is gone."""


class Away(Exception):
    """The client's own connection is lost."""

    def __init__(self, how: Break) -> None:
        super().__init__(how)
        self.how = how


@dataclass(eq=False)
class Connection:
    """One of a client's, to one gateway. A lost one may live on at the gateway: then nobody reads what comes."""

    gateway: SimGateway
    by_id: bool
    denied: int
    """So often the leader had said before that it knows nothing of the stream."""
    stream: Any = None
    handler: asyncio.Task[Any] | None = None
    begun: bool = False
    """The gateway has accepted the request."""
    inbox: deque[Any] = field(default_factory=deque)
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, event: Any) -> None:
        """Something for the client."""
        self.inbox.append(event)
        self.ready.set()

    def broken(self) -> None:
        """The gateway's process is gone."""
        self.put(Gone())

    def close(self) -> None:
        """The client hangs up, and the gateway notices."""
        if self.handler is not None:
            self.handler.cancel()

    def overtakes(self, other: Connection) -> bool:
        """Its gateway has a later claim to the stream than the other's, or may get one yet."""
        if self.stream is None:
            return self.handler is not None and not self.handler.done()
        return other.stream is not None and self.stream.claim > other.stream.claim
