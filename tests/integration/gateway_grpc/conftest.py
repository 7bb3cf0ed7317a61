"""Schedulers that end with their test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from tests.fakes.scheduler import FakeScheduler

NewScheduler = Callable[..., Awaitable[tuple[FakeScheduler, str]]]


@pytest.fixture
async def new_scheduler() -> AsyncIterator[NewScheduler]:
    """Start a scripted scheduler; gives it and its address."""
    started: list[FakeScheduler] = []

    async def start(**options: Any) -> tuple[FakeScheduler, str]:
        scheduler = FakeScheduler(**options)
        started.append(scheduler)
        return scheduler, await scheduler.start()

    yield start
    for scheduler in started:
        await scheduler.stop()
