"""Which schedulers run, from their records: for people, and for a leader that leaves, to know if one may succeed it."""

from __future__ import annotations

import asyncio
import logging

from llmos.errors import EtcdError
from llmos.etcd import EtcdClient, WatchBatch
from llmos.internal.v1 import registry_pb2
from scheduler import registry

log = logging.getLogger(__name__)


class SchedulerDirectory:
    """Follows the records of all schedulers, standbys included."""

    def __init__(self, client: EtcdClient) -> None:
        self._client = client
        self._records: dict[str, registry_pb2.SchedulerRecord] = {}

    def records(self) -> list[registry_pb2.SchedulerRecord]:
        """As last heard."""
        return list(self._records.values())

    async def run(self) -> None:
        """Until cancelled."""
        backoff = self._client.backoff()
        while True:
            try:
                async with self._client.watch(registry.SCHEDULERS) as watch:
                    async for batch in watch:
                        backoff.reset()
                        self.take(batch)
            except EtcdError as error:
                log.error("schedulers cannot be watched: %s", error.message)
            await asyncio.sleep(backoff.next_s())

    def take(self, batch: WatchBatch) -> None:
        """Take in one batch of the watch."""
        if batch.snapshot:
            self._records.clear()
        for event in batch.events:
            if event.value is None:
                self._records.pop(event.key, None)
                continue
            record = registry.scheduler_record(event.value)
            if record.scheduler_id:
                self._records[event.key] = record
