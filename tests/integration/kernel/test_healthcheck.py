"""The container health check against a real server."""

from __future__ import annotations

import asyncio
import socket

from llmos import healthcheck
from llmos.config import TlsConfig
from llmos.rpc import RpcServer


async def test_it_follows_the_server() -> None:
    server = RpcServer("127.0.0.1", 0)
    await server.start()
    address = f"127.0.0.1:{server.port}"
    assert await healthcheck.grpc_serves(address, TlsConfig())
    await server.set_serving(False)
    assert not await healthcheck.grpc_serves(address, TlsConfig())
    await server.stop(0)
    assert not await healthcheck.grpc_serves(address, TlsConfig())


async def test_nobody_listening_is_not_serving() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/ready"
        assert await asyncio.to_thread(healthcheck.main, [url]) == 1


def test_usage_errors_say_how() -> None:
    assert healthcheck.main([]) == 2
    assert healthcheck.main(["ftp://x"]) == 2
