"""Waiting for one of two events."""

from __future__ import annotations

import asyncio


async def either(one: asyncio.Event, other: asyncio.Event) -> None:
    """Return once one of them is set. No deadline: the caller's task is cancelled, or one of them means the end."""
    waits = [asyncio.create_task(one.wait()), asyncio.create_task(other.wait())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
