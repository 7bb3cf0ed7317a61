"""A bare `grpc.aio` stream: one process sends messages at a steady rate, another one notes how old they are.

python -m bench.sides.grpc_hop serve RATE BYTES      prints the port it listens on
python -m bench.sides.grpc_hop read PORT SECONDS     prints the ages in milliseconds as JSON
"""

from __future__ import annotations

import asyncio
import json
import struct
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

_TIME = struct.Struct("<Q")
_METHOD = "/bench.Hop/Stream"
_WARM = 20
"""Messages that are not counted."""


async def serve(rate: float, size: int) -> None:
    """Stream until ended."""

    async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
        filler, due = b"\0" * (size - _TIME.size), time.monotonic()
        while True:
            due += 1 / rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            yield _TIME.pack(time.monotonic_ns()) + filler

    server = grpc.aio.server()
    handler = grpc.method_handlers_generic_handler(
        "bench.Hop", {"Stream": grpc.unary_stream_rpc_method_handler(stream)}
    )
    server.add_generic_rpc_handlers((handler,))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


async def read(port: int, seconds: float) -> list[float]:
    """Ages of messages on arrival, in milliseconds."""
    ages: list[float] = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_stream(_METHOD)(b"")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            message = await call.read()
            ages.append((time.monotonic_ns() - _TIME.unpack_from(message)[0]) / 1e6)
        call.cancel()
    return ages[_WARM:]


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        asyncio.run(serve(float(sys.argv[2]), int(sys.argv[3])))
    else:
        print(json.dumps(asyncio.run(read(int(sys.argv[2]), float(sys.argv[3])))))
