"""What runs for a worker's whole life may not die unnoticed."""

from __future__ import annotations

import asyncio

import pytest

from worker.__main__ import _beside


async def dies() -> None:
    raise ZeroDivisionError("a bug")


async def lives() -> None:
    await asyncio.Event().wait()


async def test_a_death_stops_the_worker_and_is_raised() -> None:
    stop = asyncio.Event()
    with pytest.raises(ZeroDivisionError):
        async with asyncio.timeout(10), _beside(stop, lives(), dies()):
            await stop.wait()


async def test_an_orderly_end_cancels_the_rest() -> None:
    stop = asyncio.Event()
    cancelled = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with _beside(stop, work()):
        await asyncio.sleep(0)
        assert not stop.is_set()
    assert cancelled.is_set()
