"""A TCP relay that can fall silent: connections stay open, nothing passes any more. A partition for one client."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self


class TcpRelay:
    """Passes bytes between clients and `target` (host:port). While silent it accepts connections and passes nothing."""

    def __init__(self, target: str, *, silent: bool = False) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._open = asyncio.Event()
        if not silent:
            self._open.set()
        self._server: asyncio.Server | None = None
        self._sessions: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._sessions, return_exceptions=True)

    @property
    def address(self) -> str:
        """host:port for clients."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    def fall_silent(self) -> None:
        """Stop passing bytes, in both directions, on old and new connections."""
        self._open.clear()

    def cut(self) -> None:
        """Close the connections that there are; what they had not passed yet is lost."""
        for session in self._sessions:
            session.cancel()

    def speak(self) -> None:
        """Pass bytes again, those held back included."""
        self._open.set()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = asyncio.get_running_loop().create_task(self._session(reader, writer))
        self._sessions.add(session)
        session.add_done_callback(self._sessions.discard)

    async def _session(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), contextlib.closing(writer):
            await self._open.wait()
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            with contextlib.closing(far_writer):
                ways = [asyncio.ensure_future(self._pass(*way)) for way in ((reader, far_writer), (far_reader, writer))]
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.gather(*ways, return_exceptions=True)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._open.wait()
            writer.write(data)
            await writer.drain()
