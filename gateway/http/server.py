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
from gateway.http.protocol import bounded
from llmos.config import TlsConfig
from llmos.errors import ConfigError

_BACKLOG = 2048
_LAST_WRITES_S = 3.0
"""After the drain: time for the errors that ended the last streams to leave."""


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
        drain_s: float = 20.0,
    ) -> None:
        self._host = host.strip("[]")
        self._port = port
        self._tls = tls or TlsConfig()
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=bounded(limits, new_id),
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=int(limits.idle_timeout_s),
                timeout_graceful_shutdown=int(drain_s + _LAST_WRITES_S),
            )
        )
        self._write_timeout_s = limits.write_timeout_s
        self._loop: asyncio.Task[None] | None = None
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
        """Stop accepting, let running requests end within the drain time, cut the rest. Idempotent."""
        if self._loop is None:
            return
        self._server.should_exit = True
        await self._loop
        self._loop = None
        await self._server.shutdown(sockets=[self._socket] if self._socket else None)

    def _bind(self) -> socket.socket:
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
