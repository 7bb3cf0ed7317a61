"""Streams on the wire: framing, resumption points, keep-alive, back-pressure, clients that leave."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest

from gateway.config import HttpLimits
from gateway.http.sse import KEEP_ALIVE
from llmos.errors import DeadlineExceeded, Unavailable
from tests.fakes.engine import Script
from tests.integration.gateway_http.conftest import HELLO, Running, Serve

BODY = {"model": "tiny", "messages": HELLO, "stream": True}
PIECE = "x" * 16384
MANY_PIECES = 4096
"""64 MiB: more than the socket buffers of both ends can hold."""


def events(text: str) -> list[dict[str, str]]:
    """The events of a stream as their fields."""
    return [
        dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        for block in text.split("\n\n")
        if block
    ]


async def connect(server: Running, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a chat request over a connection with a small receive buffer, and read nothing."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.setblocking(False)
    await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", server.port))
    reader, writer = await asyncio.open_connection(sock=raw, limit=4096)
    data = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()
    return reader, writer


async def test_a_stream_ends_with_a_finish_and_done(serve: Serve) -> None:
    server = await serve()
    response = await server.chat(stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["llmos-seed"] == "42"
    assert response.headers["llmos-model-version"] == "v1"
    *chunks, done = events(response.text)
    assert done == {"data": "[DONE]"}
    assert json.loads(chunks[-1]["data"])["choices"][0]["finish_reason"] == "stop"


async def test_every_event_says_what_the_client_holds(serve: Serve) -> None:
    server = await serve(Script(pieces=("é", "", "bc")))
    response = await server.chat(stream=True, n=2)
    chunks = events(response.text)[:-1]
    held: dict[int, str] = {}
    for chunk in chunks:
        (choice,) = json.loads(chunk["data"])["choices"]
        held[choice["index"]] = held.get(choice["index"], "") + choice["delta"].get("content", "")
        parts = [part.removesuffix(":end").split(":") for part in chunk["id"].split(",")]
        points = {int(c): int(chars) for c, _, chars in parts}
        assert points == {number: len(text) for number, text in held.items()}
    assert chunks[-1]["id"] == "0:3:3:end,1:3:3:end"


@pytest.mark.parametrize("error", [Unavailable("lost"), DeadlineExceeded("late"), KeyError("secret")])
async def test_a_broken_stream_ends_with_an_error_event(serve: Serve, error: Exception) -> None:
    server = await serve(Script(fail=error))
    response = await server.chat(stream=True)
    assert response.status_code == 200
    last = json.loads(events(response.text)[-1]["data"])
    assert last["error"]["code"] == getattr(error, "code", "internal_error")
    assert last["error"]["request_id"] == response.headers["x-request-id"]
    assert "[DONE]" not in response.text
    assert "secret" not in response.text


async def test_a_stream_that_just_stops_is_an_error(serve: Serve) -> None:
    server = await serve(Script(forget_done=True))
    response = await server.chat(stream=True)
    assert json.loads(events(response.text)[-1]["data"])["error"]["code"] == "internal_error"
    whole = await server.chat()
    assert whole.status_code == 500


async def test_an_error_after_a_long_wait_is_an_event(serve: Serve) -> None:
    hold = asyncio.Event()
    script = Script(hold_start=hold, fail=Unavailable("no leader"), fail_before_output=True)
    server = await serve(script, limits=HttpLimits(refusal_wait_s=0.05))
    async with server.http.stream("POST", "/v1/chat/completions", json=BODY) as response:
        assert response.status_code == 200
        hold.set()
        text = "".join([part async for part in response.aiter_text()])
    assert json.loads(events(text)[-1]["data"])["error"]["code"] == "unavailable"


async def test_silence_is_filled_with_comments_that_openais_client_passes_over(serve: Serve) -> None:
    hold, hold_start = asyncio.Event(), asyncio.Event()
    server = await serve(
        Script(hold=hold, hold_start=hold_start), limits=HttpLimits(keep_alive_s=0.05, refusal_wait_s=0.05)
    )
    async with server.http.stream("POST", "/v1/chat/completions", json=BODY) as response:
        seen, parts = "", response.aiter_text()
        for release in (hold_start, hold):
            seen = ""
            while seen.count(KEEP_ALIVE.decode()) < 2:
                seen += await anext(parts)
            release.set()
        seen += "".join([part async for part in parts])
    assert seen.endswith("data: [DONE]\n\n")
    hold.clear()
    said = ""
    async for chunk in await server.client.chat.completions.create(model="tiny", messages=HELLO, stream=True):
        said += chunk.choices[0].delta.content or ""
        if said == "Hel":
            asyncio.get_running_loop().call_later(0.2, hold.set)
    assert said == "Hello world"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("output", [False, True], ids=["before output", "in the middle"])
async def test_a_client_that_leaves_takes_its_generation_along(serve: Serve, stream: bool, output: bool) -> None:
    never = asyncio.Event()
    server = await serve(Script(hold=never) if output else Script(hold_start=never))
    _, writer = await connect(server, {**BODY, "stream": stream})
    await server.engine.began.wait()
    (generation,) = server.engine.generations
    assert not generation.closed.is_set()
    writer.close()
    await asyncio.wait_for(generation.closed.wait(), 5)
    assert generation.reason == "client_gone"
    assert (await server.http.get("/health")).status_code == 200


async def test_a_slow_reader_slows_its_generation_down(serve: Serve) -> None:
    server = await serve(Script(pieces=[PIECE] * MANY_PIECES))
    reader, writer = await connect(server, BODY)
    await server.engine.began.wait()
    (generation,) = server.engine.generations
    before = -1
    while generation.produced != before:
        before = generation.produced
        await asyncio.sleep(0.2)
    assert 0 < generation.produced < MANY_PIECES / 2
    while await reader.read(1 << 20):
        if generation.ended:
            break
    assert generation.produced == MANY_PIECES
    writer.close()


async def test_a_client_that_never_reads_is_cut(serve: Serve) -> None:
    server = await serve(Script(endless=PIECE), limits=HttpLimits(write_timeout_s=0.3))
    reader, writer = await connect(server, BODY)
    await server.engine.began.wait()
    (generation,) = server.engine.generations
    await asyncio.wait_for(generation.closed.wait(), 10)
    with pytest.raises(ConnectionError):
        while await reader.read(1 << 20):
            pass
    writer.close()
    assert (await server.http.get("/health")).status_code == 200


async def test_many_streams_at_once(serve: Serve) -> None:
    server = await serve()
    answers = await asyncio.gather(*(server.chat(stream=True) for _ in range(64)))
    assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers)
    assert len({answer.headers["x-request-id"] for answer in answers}) == 64


async def test_head_takes_no_stream_up(serve: Serve) -> None:
    """Whoever asks for a stream has it alone from then on; a look at the headers is no wish for it."""
    server = await serve()
    response = await server.http.head("/v1/streams/req-1")
    assert (response.status_code, response.headers["allow"]) == (405, "GET")
