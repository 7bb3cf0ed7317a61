"""Single calls to the leader whose answers arrive damaged."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest

from gateway.leader import LeaderClient, leads
from llmos.errors import Unavailable
from llmos.rpc import open_channel
from llmos.v1 import fleet_pb2

WAIT_S = 10.0


@contextlib.asynccontextmanager
async def damaged_answers(service: str, method: str, *, streams: bool = False) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server whose answer to `method` is no message."""

    async def damaged(request: bytes, context: object) -> bytes:
        return b"\xff\xff"

    async def damaged_stream(request: bytes, context: object) -> AsyncIterator[bytes]:
        yield b"\xff\xff"

    handler = (
        grpc.unary_stream_rpc_method_handler(damaged_stream)
        if streams
        else grpc.unary_unary_rpc_method_handler(damaged)
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(0)


async def test_a_damaged_answer_to_who_leads_is_none() -> None:
    async with damaged_answers("llmos.internal.v1.Requests", "Leads") as channel:
        assert await leads(channel, WAIT_S) == 0


async def test_a_damaged_answer_of_the_leader_is_an_error_that_says_so() -> None:
    async with damaged_answers("llmos.v1.Fleet", "GetLoad") as channel:
        with pytest.raises(Unavailable, match="damaged"):
            await LeaderClient(lambda: channel).get_load(fleet_pb2.GetLoadRequest())
    async with damaged_answers("llmos.internal.v1.Requests", "FetchBlob", streams=True) as channel:
        with pytest.raises(Unavailable, match="damaged"):
            await LeaderClient(lambda: channel).fetch_blob("00")
