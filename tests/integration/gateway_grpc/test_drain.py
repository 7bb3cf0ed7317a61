"""A gateway that goes: who comes all the same is served, and what outlasts the drain ends with a typed error."""

from __future__ import annotations

import asyncio

import pytest

from llmos.errors import Unavailable
from tests.fakes.scheduler import LENGTH, output
from tests.integration.gateway_grpc.conftest import NewScheduler
from tests.integration.gateway_grpc.gateway import collect, running, text_of


async def test_a_retiring_gateway_is_not_ready_and_still_serves(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler()
    async with running(address) as gateway:
        await gateway.ready()
        before = await gateway.chat(max_tokens=1)
        first = (await scheduler.next_submit()).request_id
        gateway.sessions.retire()
        assert not gateway.sessions.ready()
        late = await gateway.chat(max_tokens=1)
        second = (await scheduler.next_submit()).request_id
        idle = asyncio.create_task(gateway.sessions.idle())
        scheduler.send(output(first, 0, "a", finish=LENGTH))
        assert text_of(await collect(before)) == "a"
        assert not idle.done()
        scheduler.send(output(second, 0, "b", finish=LENGTH))
        assert text_of(await collect(late)) == "b"
        await idle


async def test_a_closed_gateway_refuses_and_ends_with_a_resumable_error(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler()
    async with running(address) as gateway:
        await gateway.ready()
        stream = await gateway.chat(max_tokens=2)
        await scheduler.next_submit()
        gateway.sessions.close()
        with pytest.raises(Unavailable, match="resume the stream"):
            await collect(stream)
        with pytest.raises(Unavailable, match="try another one"):
            await gateway.chat()
