"""The watch on workers' records, turned into events.

A record says who is a member; it does not say who is alive. A list after a break that lacks somebody may only mean that
etcd has been away longer than a lease, so whoever is missing from it has some time to register again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from llmos.etcd import EtcdClient, WatchBatch
from scheduler import events, registry

REJOIN_S = 5.0


class Membership:
    """Owned by one reign. `post` takes events without waiting: they are as few as changes of membership."""

    def __init__(
        self, client: EtcdClient, post: Callable[[events.Event], None], rng: random.Random, rejoin_s: float = REJOIN_S
    ) -> None:
        self._client = client
        self._post = post
        self._rng = rng
        self._rejoin_s = rejoin_s
        self._known: set[str] = set()
        self._missing: dict[str, asyncio.TimerHandle] = {}
        self._listed = False

    async def run(self) -> None:
        """Until cancelled. Raises EtcdAuthFailed."""
        try:
            async with self._client.watch(registry.WORKERS) as watch:
                async for batch in watch:
                    self.take(batch)
        finally:
            for timer in self._missing.values():
                timer.cancel()
            self._missing.clear()

    def take(self, batch: WatchBatch) -> None:
        """Turn one batch into events."""
        present = set[str]()
        for event in batch.events:
            worker_id = event.key.removeprefix(registry.WORKERS)
            if event.value is None:
                self._gone(worker_id)
                continue
            record = registry.worker_record(event.key, event.value)
            if record is not None:
                present.add(worker_id)
                self._here(worker_id)
                self._post(events.WorkerRegistered(record))
        if batch.snapshot:
            for worker_id in sorted(self._known - present):
                self._miss(worker_id)
            if not self._listed:
                self._listed = True
                self._post(events.MembersListed())

    def _here(self, worker_id: str) -> None:
        self._known.add(worker_id)
        timer = self._missing.pop(worker_id, None)
        if timer is not None:
            timer.cancel()

    def _miss(self, worker_id: str) -> None:
        if worker_id not in self._missing:
            delay = self._rejoin_s * self._rng.uniform(1.0, 1.5)
            loop = asyncio.get_running_loop()
            self._missing[worker_id] = loop.call_later(delay, self._gone, worker_id)

    def _gone(self, worker_id: str) -> None:
        self._here(worker_id)
        self._known.discard(worker_id)
        self._post(events.WorkerDeregistered(worker_id))
