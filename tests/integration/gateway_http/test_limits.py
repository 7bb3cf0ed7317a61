"""Bounds that hold before anything is kept, and what is said about them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.config import HttpLimits
from llmos.clock import SystemClock
from llmos.keys import add_key
from tests.fakes.engine import Script
from tests.integration.gateway_http.conftest import Serve

JSON = {"content-type": "application/json"}
LIMITS = HttpLimits(max_body_bytes=10_000)


async def chunks(count: int, size: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b" " * size


@pytest.mark.parametrize("size", [10_001, 20 << 20])
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "streamed"])
async def test_a_body_over_the_limit_is_refused_and_the_client_reads_why(
    serve: Serve, declared: bool, size: int
) -> None:
    server = await serve(limits=LIMITS)
    content = b" " * size if declared else chunks(size // 10_001, 10_001)
    response = await server.http.post("/v1/completions", content=content, headers=JSON)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "payload_too_large"
    assert (await server.http.get("/health")).status_code == 200


async def test_a_body_at_the_limit_is_read(serve: Serve) -> None:
    server = await serve(limits=LIMITS)
    body = b'{"model": "tiny", "prompt": "x"}'.ljust(LIMITS.max_body_bytes)
    assert (await server.http.post("/v1/completions", content=body, headers=JSON)).status_code == 200


async def test_a_body_that_does_not_come_is_not_waited_for(serve: Serve) -> None:
    server = await serve(limits=HttpLimits(body_timeout_s=0.1))
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{")
    assert b" 400 " in await asyncio.wait_for(reader.readline(), 10)
    writer.close()


@pytest.mark.parametrize("start", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: x\r\n"])
async def test_a_head_that_does_not_come_is_not_waited_for(serve: Serve, start: bytes) -> None:
    server = await serve(limits=HttpLimits(header_timeout_s=0.1))
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(start)
    with pytest.raises(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(), 10) == b"nothing"
    writer.close()


async def test_a_second_head_on_the_same_connection_is_not_waited_for_either(serve: Serve) -> None:
    server = await serve(limits=HttpLimits(header_timeout_s=0.1))
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    await asyncio.wait_for(reader.readuntil(b'"ok"}'), 10)
    writer.write(b"GET /hea")
    with pytest.raises(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(), 10) == b"nothing"
    writer.close()


async def test_an_endless_head_is_cut_off(serve: Serve) -> None:
    server = await serve()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET / HTTP/1.1\r\n")
    sent = 0
    while not reader.at_eof() and sent < 1000 and not writer.is_closing():
        writer.write(b"x-%d: %s\r\n" % (sent, b"y" * 1000))
        sent += 1
        if sent % 50 == 0:
            await asyncio.sleep(0.01)
    answer = b""
    with contextlib.suppress(ConnectionError):  # cut while we were still writing
        answer = await asyncio.wait_for(reader.read(), 10)
    assert answer == b"" or b" 413 " in answer.splitlines()[0]
    writer.close()
    assert (await server.http.get("/health")).status_code == 200


async def test_connections_past_the_limit_are_told_to_come_back(serve: Serve) -> None:
    server = await serve(limits=HttpLimits(max_connections=2))
    held = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(2)]
    for reader, writer in held:
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b'"ok"}')
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    answer = (await asyncio.wait_for(reader.read(), 10)).lower()
    assert answer.startswith(b"http/1.1 503")
    assert b"retry-after: 1" in answer
    writer.close()
    for _, writer in held:
        writer.close()
        await writer.wait_closed()
    async with asyncio.timeout(10):
        while (await server.http.get("/health")).status_code != 200:
            pass


async def test_requests_past_the_limit_are_told_to_come_back_but_probes_are_answered(serve: Serve) -> None:
    hold = asyncio.Event()
    server = await serve(Script(hold=hold), limits=HttpLimits(max_requests=1))
    first = asyncio.create_task(server.chat())
    await server.engine.began.wait()
    refused = await server.chat()
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.headers["x-should-retry"] == "true"
    assert (await server.http.get("/health")).status_code == 200
    assert (await server.http.get("/ready")).status_code == 200
    hold.set()
    assert (await first).status_code == 200


async def test_ids_deadlines_and_trace_context_reach_the_engine(serve: Serve) -> None:
    server = await serve()
    headers = {"x-request-id": "mine-1", "x-request-timeout": "2.5", "traceparent": "00-a-b-01", "tracestate": "k=v"}
    response = await server.http.post("/v1/completions", json={"model": "tiny", "prompt": "x"}, headers=headers)
    assert response.headers["x-request-id"] == "mine-1"
    assert int(response.headers["openai-processing-ms"]) >= 0
    assert server.engine.request_ids == ["mine-1"]
    assert server.engine.generations[0].request.deadline_s == 2.5
    assert (server.engine.traces[0].traceparent, server.engine.traces[0].tracestate) == ("00-a-b-01", "k=v")
    bad = await server.http.post("/v1/completions", json={}, headers=headers)
    assert bad.headers["x-request-id"] == "mine-1"
    assert (await server.http.get("/nope")).headers["x-request-id"].startswith("made-")


async def test_probes_version_and_metrics(serve: Serve) -> None:
    server = await serve()
    assert (await server.http.get("/version")).json() == {"version": "1.2.3"}
    assert (await server.http.get("/health")).json() == {"status": "ok"}
    server.engine.is_ready = False
    not_ready = await server.http.get("/ready")
    assert (not_ready.status_code, not_ready.headers["retry-after"]) == (503, "1")
    await server.chat()
    metrics = await server.http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'llmos:generation_tokens_total{model_name="tiny"} 4.0' in metrics.text
    assert 'llmos:http_requests_total{method="POST",route="/v1/chat/completions",status="200"} 1.0' in metrics.text


async def test_with_keys_only_their_holders_are_served(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    user, _ = add_key(file, "acme", priority="batch", now_unix_s=int(SystemClock().unix_ns() // 10**9))
    operator, _ = add_key(file, "ops", role="operator")
    server = await serve(keys_file=file)
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": user}):
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
            refused = await server.http.post(path, json={}, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert (await server.http.get("/v1/models", headers=headers)).status_code == 401
        assert (await server.http.get("/metrics", headers=headers)).status_code == 401
    bearer = {"authorization": f"Bearer {user}"}
    body = {"model": "tiny", "prompt": "x"}
    assert (await server.http.post("/v1/completions", json=body, headers=bearer)).status_code == 200
    (identity,) = server.engine.identities
    assert (identity.tenant, identity.role, identity.priority) == ("acme", "user", "batch")
    assert (await server.http.get("/metrics", headers=bearer)).status_code == 403
    assert (await server.http.get("/metrics", headers={"authorization": f"Bearer {operator}"})).status_code == 200
    for path in ("/health", "/ready", "/version"):
        assert (await server.http.get(path)).status_code == 200


async def test_without_keys_any_key_is_accepted(serve: Serve) -> None:
    server = await serve(key="whatever")
    assert (await server.client.models.list()).data
    assert (await server.chat()).status_code == 200
