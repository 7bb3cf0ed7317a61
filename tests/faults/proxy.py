"""A TCP proxy that delays, stalls, resets, slices or corrupts what passes, each direction alone.

`up` is from the one who connected to the target, `down` is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from dataclasses import dataclass, field
from typing import Literal, Self

Way = Literal["up", "down"]
_CHUNK = 65536
_FRAME_HEADER = 40
"""Bytes at the head of a read that are spared by `corrupt`: mostly framing, whose damage only ends the connection."""


@dataclass(slots=True)
class Mischief:
    """What is done to one direction. Set its fields at any time."""

    delay_s: float = 0.0
    slice_bytes: int = 0
    """Pass at most so many bytes at a time; 0: as they come."""
    flips: int = 0
    """So many of the next reads get one bit flipped."""
    passing: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.passing.set()


class FaultProxy:
    """Between any two services. `async with FaultProxy("127.0.0.1:5") as proxy:`."""

    def __init__(self, target: str, port: int = 0, seed: int = 0) -> None:
        host, _, number = target.rpartition(":")
        self._target = (host, int(number))
        self._port = port
        self._rng = random.Random(seed)
        self._server: asyncio.Server | None = None
        self._sessions: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        self.ways: dict[Way, Mischief] = {"up": Mischief(), "down": Mischief()}
        self.flipped = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._server is not None
        self._server.close()
        for session in self._sessions:
            session.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)

    @property
    def address(self) -> str:
        """host:port to connect to."""
        return f"127.0.0.1:{self._port}"

    def stall(self, *ways: Way) -> None:
        """Hold everything back, in both directions if none is named; connections stay open."""
        for way in ways or ("up", "down"):
            self.ways[way].passing.clear()

    def reset(self) -> None:
        """RST on every connection, to both sides."""
        for session, writers in list(self._sessions.items()):
            for writer in writers:
                sock = writer.get_extra_info("socket")
                if sock is not None:
                    with contextlib.suppress(OSError):
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            session.cancel()

    def heal(self) -> None:
        """Pass everything again, what was held back included."""
        for mischief in self.ways.values():
            mischief.delay_s, mischief.slice_bytes, mischief.flips = 0.0, 0, 0
            mischief.passing.set()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = asyncio.get_running_loop().create_task(self._session(reader, writer))
        self._sessions[session] = [writer]
        session.add_done_callback(self._sessions.pop)

    async def _session(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), contextlib.closing(writer):
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            current = asyncio.current_task()
            assert current is not None
            self._sessions[current].append(far_writer)
            with contextlib.closing(far_writer):
                ways = [
                    asyncio.ensure_future(self._pass(reader, far_writer, self.ways["up"])),
                    asyncio.ensure_future(self._pass(far_reader, writer, self.ways["down"])),
                ]
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.gather(*ways, return_exceptions=True)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, mischief: Mischief) -> None:
        while data := await reader.read(_CHUNK):
            if mischief.delay_s:
                await asyncio.sleep(mischief.delay_s)
            await mischief.passing.wait()
            if mischief.flips and len(data) > _FRAME_HEADER:
                mischief.flips -= 1
                data = self._flip(data)
            size = mischief.slice_bytes or len(data)
            for start in range(0, len(data), size):
                writer.write(data[start : start + size])
                await writer.drain()

    def _flip(self, data: bytes) -> bytes:
        place = self._rng.randrange(_FRAME_HEADER, len(data))
        self.flipped += 1
        return data[:place] + bytes([data[place] ^ (1 << self._rng.randrange(8))]) + data[place + 1 :]
