"""The bare peers: a uvicorn server that streams one constant event over and over, and a `grpc.aio` stream of one hop.

    python -m bench.sides.bare_sse PORT

Answers every POST with as many events as its `max_tokens` says. The event comes in the environment. Between two events
of a stream all other streams have their turn, as with tokens that come one by one.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import uvicorn

_EVENT = os.environ.get("BENCH_EVENT", "data: {}\n\n").encode()
_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The ASGI application, without a framework."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    for _ in range(json.loads(body)["max_tokens"]):
        await send({"type": "http.response.body", "body": _EVENT, "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


if __name__ == "__main__":
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        loop="uvloop",
        http="httptools",
        lifespan="off",
        access_log=False,
        log_level="error",
        interface="asgi3",
    )
