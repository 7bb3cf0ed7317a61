"""Malformed requests: refused with a 4xx and OpenAI's error object, and the service goes on."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.integration.gateway_http.conftest import HELLO, Serve
from tests.integration.gateway_http.malformed import bodies

JSON = {"content-type": "application/json"}


def assert_refused(response: httpx.Response, what: object) -> None:
    assert 400 <= response.status_code < 500, (response.status_code, what, response.text)
    error = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}, what
    assert error["message"]
    assert response.headers["x-request-id"]


async def test_malformed_bodies_are_refused_and_nothing_else_happens(serve: Serve) -> None:
    server = await serve()
    count = 0
    for body in bodies():
        for path in ("/v1/chat/completions", "/v1/completions"):
            response = await server.http.post(path, content=body, headers=JSON)
            assert_refused(response, body[:200])
            count += 1
    assert count > 400
    assert server.engine.generations == []
    assert (await server.chat()).status_code == 200


async def test_nearly_malformed_bodies_are_served(serve: Serve) -> None:
    """The list above refuses by reason, not by habit."""
    server = await serve()
    for body in (
        b' {"model": "tiny", "messages": [{"role": "user", "content": ""}]} ',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud83d\\ude00 \\u0000"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "' + b"[{" * 5000 + b'"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "seed": -1, "metadata": {"a": [[]]}}',
    ):
        response = await server.http.post("/v1/chat/completions", content=body, headers=JSON)
        assert response.status_code == 200, response.text


HEADERS: list[tuple[dict[str, str], int]] = [
    ({}, 415),
    ({"content-type": "text/plain"}, 415),
    ({"content-type": "application/x-www-form-urlencoded"}, 415),
    ({**JSON, "content-encoding": "gzip"}, 415),
    ({**JSON, "x-request-id": "a b"}, 400),
    ({**JSON, "x-request-id": "x" * 129}, 400),
    ({**JSON, "x-request-timeout": "soon"}, 400),
    ({**JSON, "x-request-timeout": "-1"}, 400),
    ({**JSON, "x-big": "x" * 40_000}, 413),
    ({"content-type": "application/json; charset=utf-8"}, 200),
    ({**JSON, "x-request-timeout": "30"}, 200),
]


async def test_headers(serve: Serve) -> None:
    server = await serve()
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}]}'
    for headers, status in HEADERS:
        response = await server.http.post("/v1/chat/completions", content=body, headers=headers)
        assert response.status_code == status, headers
        if status != 200:
            assert_refused(response, headers)


ROUTES = [
    ("GET", "/", 404),
    ("GET", "/v1", 404),
    ("POST", "/v1/responses", 404),
    ("GET", "/v1/models/", 404),
    ("GET", "/v1/chat/completions", 405),
    ("DELETE", "/v1/completions", 405),
    ("POST", "/v1/models", 405),
    ("POST", "/health", 405),
    ("OPTIONS", "/v1/chat/completions", 405),
    ("GET", "/v1/models/%ff%00%2f..", 404),
    ("GET", "/" + "x" * 20_000, 404),
]


async def test_unknown_routes_and_methods(serve: Serve) -> None:
    server = await serve()
    for method, path, status in ROUTES:
        response = await server.http.request(method, path)
        assert response.status_code == status, (method, path)
        assert_refused(response, path)
        assert ("allow" in response.headers) == (status == 405)


RAW_REQUESTS = [
    b"\r\n\r\n",
    b"GET\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\ncontent-length: 99999999999999999999999\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/completions HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
    b"GET /health HTTP/1.1\r\nbad header\r\n\r\n",
    b"GET /%zz%%% HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: x\r\nx: \xff\xfe\r\nconnection: close\r\nx-request-id: \xe9\r\n\r\n",
]


async def test_bytes_that_are_barely_http(serve: Serve) -> None:
    server = await serve()
    for raw in RAW_REQUESTS:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(raw)
        writer.write_eof()
        answer = await asyncio.wait_for(reader.read(), 10)
        assert answer == b"" or answer.split(b" ", 2)[1].startswith(b"4"), (raw, answer)
        writer.close()
    assert (await server.http.get("/health")).status_code == 200


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    server = await serve()
    for _ in range(5):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    assert (await server.chat(messages=HELLO)).status_code == 200
    assert [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []
