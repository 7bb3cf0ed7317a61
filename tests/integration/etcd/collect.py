"""Follows a watch the way a service would: applies batches to a dict, and writes down what it saw."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self

from llmos.etcd import Watch, WatchBatch, WatchEvent


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds, for what has no event to wait for."""
    async with asyncio.timeout(30):
        while True:
            if condition():
                return
            await asyncio.sleep(0.02)


class Collector:
    """Iterates `watch` in a task. `state`: the keys as the watch tells; `history`: every event outside snapshots."""

    def __init__(self, watch: Watch) -> None:
        self.state: dict[str, bytes] = {}
        self.history: list[WatchEvent] = []
        self.snapshots = 0
        self._batches = 0
        self._watch = watch
        self._changed = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._follow())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait({self._task})
        await self._watch.aclose()
        if not self._task.cancelled():
            self._task.result()

    async def until(self, key: str, value: bytes | None) -> None:
        """Wait until the state, once there is one, has `key` at `value` (None: not at all)."""
        async with asyncio.timeout(30), self._changed:
            await self._changed.wait_for(lambda: self._batches > 0 and self.state.get(key) == value)

    async def _follow(self) -> None:
        async for batch in self._watch:
            async with self._changed:
                self._apply(batch)
                self._changed.notify_all()

    def _apply(self, batch: WatchBatch) -> None:
        self._batches += 1
        if batch.snapshot:
            self.snapshots += 1
            self.state.clear()
        else:
            self.history.extend(batch.events)
        for event in batch.events:
            if event.value is None:
                self.state.pop(event.key, None)
            else:
                self.state[event.key] = event.value
