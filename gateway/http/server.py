"""The HTTP server's life: bind, serve, stop."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress

import uvicorn
from starlette.types import ASGIApp

from gateway.config import HttpLimits
from gateway.http.protocol import BoundedProtocol, bounded
from llmos.config import TlsConfig
from llmos.errors import ConfigError

_BACKLOG = 2048
_LAST_ASKED_S = 0.5
"""Connections on which nothing was asked for this long are closed once nobody listens any more."""
_POLL_S = 0.05


class HttpServer:
    """Serves `app` on host:port from `start` to `stop`. HTTPS if `tls` has a certificate; clients need none."""

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        *,
        limits: HttpLimits,
        new_id: Callable[[], str],
        tls: TlsConfig | None = None,
        inherited: int | None = None,
    ) -> None:
        """`inherited`: descriptor of a socket that listens already, in place of host and port."""
        self._host = host.strip("[]")
        self._port = port
        self._tls = tls or TlsConfig()
        self._inherited = inherited
        self._protocol = bounded(limits, new_id)
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=self._protocol,
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=int(limits.idle_timeout_s),
                timeout_graceful_shutdown=None,  # the caller cuts
            )
        )
        self._write_timeout_s = limits.write_timeout_s
        self._loop: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._socket: socket.socket | None = None
        self.port = 0
        """The port that is listened on, once started."""

    async def start(self) -> int:
        """Bind and serve. Returns the port. Raises ConfigError if the address is taken or a certificate is bad."""
        server, config = self._server, self._server.config
        config.load()
        config.ssl = self._context()
        server.lifespan = config.lifespan_class(config)
        self._socket = self._bind()
        self.port = int(self._socket.getsockname()[1])
        await server.startup(sockets=[self._socket])
        self._loop = asyncio.create_task(server.main_loop(), name="http-server")
        return self.port

    async def stop(self) -> None:
        """Stop listening, then wait until the last response is written or `cut` is called. Idempotent."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(), name="http-stop")
        await asyncio.shield(self._stopping)

    def cut(self) -> None:
        """End what still runs now, whatever is not written; `stop` returns soon after."""
        self._server.force_exit = True
        for task in self._server.server_state.tasks:
            task.cancel()

    async def _stop(self) -> None:
        if self._loop is None:
            return
        for server in self._server.servers:
            server.close()
        self._protocol.retiring_s = _LAST_ASKED_S
        connections = self._server.server_state.connections
        for connection in list(connections):
            assert isinstance(connection, BoundedProtocol)
            connection.retire(_LAST_ASKED_S)
        while connections and not self._server.force_exit:  # noqa: ASYNC110 - many protocols empty it
            await asyncio.sleep(_POLL_S)
        self._server.should_exit = True
        await self._loop
        await self._server.shutdown(sockets=[self._socket] if self._socket else None)

    def _bind(self) -> socket.socket:
        if self._inherited is not None:
            return _adopt(self._inherited)
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        # The protocol is named because event loops switch Nagle's algorithm off only for sockets that name it.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # A client behind a silent partition is noticed by its unacknowledged bytes; accepted sockets inherit this.
            with suppress(AttributeError):  # Linux only
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._write_timeout_s * 1000))
            listener.bind((self._host, self._port))
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            reason = error.strerror or error
            raise ConfigError(f"cannot listen on {self._host}:{self._port}: {reason}", param="http_port") from error
        return listener

    def _context(self) -> ssl.SSLContext | None:
        if self._tls.cert_file is None or self._tls.key_file is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self._tls.cert_file, self._tls.key_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"cannot use the TLS certificate: {error.strerror or error}", param="tls") from error
        return context


def _adopt(descriptor: int) -> socket.socket:
    """A listening socket that whoever started us holds too: while one process goes and the next comes, nobody who
    connects is refused."""
    try:
        listener = socket.socket(fileno=descriptor)
        if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ConfigError(f"descriptor {descriptor} is no listening socket", param="http_fd")
    except OSError as error:
        raise ConfigError(f"cannot use descriptor {descriptor}: {error.strerror or error}", param="http_fd") from error
    return listener
