"""The load generator against a scripted server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from bench.client import Target, Trace, play, saturate, send
from bench.mix import Arrival, Request

OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TEXT = b'data: {"choices": [{"text": "a"}]}\n\n'
EMPTY = b'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n\n'
DONE = b"data: [DONE]\n\n"


def chunked(*events: bytes) -> bytes:
    return OK + b"".join(f"{len(event):x}\r\n".encode() + event + b"\r\n" for event in events)


class Server:
    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.bodies: list[dict[str, object]] = []

    @asynccontextmanager
    async def target(self) -> AsyncIterator[Target]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield Target(server.sockets[0].getsockname()[1], {"model": "m"})

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
        self.bodies.append(json.loads(await reader.readexactly(length)))
        writer.write(self.answer)
        writer.close()


async def sent(answer: bytes) -> tuple[Trace, Server]:
    server, trace = Server(answer), Trace(0.0, 2)
    async with server.target() as target:
        await send(target, "hello", 7, trace)
    return trace, server


async def test_a_stream_becomes_the_times_of_its_texts() -> None:
    trace, server = await sent(chunked(TEXT, TEXT, EMPTY, DONE))

    assert (len(trace.times_s), trace.finished, trace.error) == (2, True, "")
    assert server.bodies == [{"model": "m", "prompt": "hello", "max_tokens": 2, "seed": 7, "stream": True}]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\n\r\nlater", "429"),
        (chunked(TEXT, b'data: {"error": {"message": "lost"}}\n\n'), "lost"),
        (chunked(TEXT), "broke off"),
        (chunked(b"data: not json\n\n"), "JSONDecodeError"),
    ],
)
async def test_what_goes_wrong_is_told(answer: bytes, error: str) -> None:
    trace, _ = await sent(answer)

    assert error in trace.error
    assert not trace.finished


async def test_arrivals_and_clients_are_all_served() -> None:
    server = Server(chunked(TEXT, DONE))
    due = [Arrival(0.001 * number, Request(0, 32, 2, number)) for number in range(3)]
    async with server.target() as target:
        played = await play(target, due, ["a", "b", "c"], 5.0)
        pressed = await saturate(target, iter([("x", 2, 1)] * 5), 2, 5.0)

    assert [trace.finished for trace in (*played, *pressed)] == [True] * 8
    assert sorted(str(body["prompt"]) for body in server.bodies[:3]) == ["a", "b", "c"]


async def test_a_client_gives_up_on_a_server_that_refuses() -> None:
    async with Server(b"HTTP/1.1 500 Oh\r\n\r\n").target() as target:
        assert len(await saturate(target, iter([("x", 2, 1)] * 50), 2, 5.0)) == 2
