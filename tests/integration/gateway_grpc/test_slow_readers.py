"""Readers that do not read: bounded, and judged only after they had their turn."""

from __future__ import annotations

import asyncio

import pytest

from gateway.session_config import SessionConfig
from llmos.errors import SlowReader
from tests.fakes.scheduler import LENGTH, output
from tests.integration.gateway_grpc.conftest import NewScheduler
from tests.integration.gateway_grpc.gateway import collect, running, text_of


async def test_a_reader_that_does_not_read_loses_its_stream_and_no_other(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler()
    async with running(address, session=SessionConfig(buffer_bytes=10_000)) as gateway:
        await gateway.ready()
        lazy, eager = await gateway.chat(max_tokens=2000), await gateway.chat(max_tokens=2000)
        names = [(await scheduler.next_submit()).request_id for _ in range(2)]
        eager_events = asyncio.create_task(collect(eager))
        for index in range(0, 2000, 20):
            finish = LENGTH if index == 1980 else 0
            scheduler.send(*(output(name, index, "x" * 20, finish=finish) for name in names))
            # Every eighth frame is acknowledged at once.
            await scheduler.until(lambda expected=index // 20 - 7: scheduler.acknowledged >= expected)
        assert text_of(await eager_events) == "x" * 2000
        with pytest.raises(SlowReader):
            await collect(lazy)
        await scheduler.until(lambda: scheduler.cancels)
        assert [(cancel.request_id, cancel.reason) for cancel in scheduler.cancels] == [(names[0], "slow_reader")]


async def test_a_burst_larger_than_the_buffer_is_read_when_the_reader_has_its_turn(new_scheduler: NewScheduler) -> None:
    """A process that stood still gets at once what came meanwhile; its readers had no chance to read any of it."""
    scheduler, address = await new_scheduler()
    async with running(address, session=SessionConfig(buffer_bytes=10_000)) as gateway:
        await gateway.ready()
        stream, unread = await gateway.chat(max_tokens=300), await gateway.chat(max_tokens=320)
        names = [(await scheduler.next_submit()).request_id for _ in range(2)]
        events = asyncio.create_task(collect(stream))
        for name in names:
            finish = {280: LENGTH} if name == names[0] else {}
            scheduler.send(*(output(name, i, "x" * 20, finish=finish.get(i, 0)) for i in range(0, 300, 20)))
        assert text_of(await events) == "x" * 300
        await scheduler.until(lambda: scheduler.cancels)
        assert [(cancel.request_id, cancel.reason) for cancel in scheduler.cancels] == [(names[1], "slow_reader")]
        with pytest.raises(SlowReader):
            await collect(unread)
