"""The container health check against a real server."""

from __future__ import annotations

import asyncio
import socket

import pytest

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


async def test_a_proxy_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server = await asyncio.start_server(answer_ok, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        assert await asyncio.to_thread(healthcheck.main, [f"http://127.0.0.1:{port}/ready"]) == 0


async def test_garbage_is_not_serving() -> None:
    async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"\0\1\2 what?\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(garbage, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        assert await asyncio.to_thread(healthcheck.main, [f"http://127.0.0.1:{port}/ready"]) == 1


async def answer_ok(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
    await writer.drain()
    writer.close()


def test_usage_errors_say_how() -> None:
    assert healthcheck.main([]) == 2
    assert healthcheck.main(["ftp://x"]) == 2
