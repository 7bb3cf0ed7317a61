"""How much service tenants have had, in etcd: written about every two seconds, read at the beginning of a reign.

Nothing waits for it. While etcd is away the record grows old, and with it what a new leader knows; that is all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from llmos.errors import EtcdError
from llmos.etcd import Compare, EtcdClient, Put
from llmos.internal.v1 import registry_pb2
from scheduler import registry
from scheduler.events import ServiceInherited

log = logging.getLogger(__name__)

PERIOD_S = 2.0


class ServiceLog:
    """Owned by one reign. `counters` reads the core's state; `inherited` takes what an earlier leader wrote."""

    def __init__(
        self,
        client: EtcdClient,
        term: Callable[[], int],
        counters: Callable[[], list[registry_pb2.TenantService]],
        inherited: Callable[[ServiceInherited], None],
        period_s: float = PERIOD_S,
    ) -> None:
        self._client = client
        self._term = term
        self._counters = counters
        self._inherited = inherited
        self._period_s = period_s
        self.written = 0
        """Times that the record was written."""

    async def run(self) -> None:
        """Until cancelled."""
        await self._inherit()
        last: list[registry_pb2.TenantService] = []
        while True:
            await asyncio.sleep(self._period_s)
            counters = self._counters()
            if counters == last:
                continue
            try:
                if await self.write(counters):
                    last = counters
                    self.written += 1
            except EtcdError as error:
                log.debug("the record of service was not written: %s", error.message)

    async def _inherit(self) -> None:
        backoff = self._client.backoff()
        while True:
            try:
                found = await self._client.get(registry.SERVICE)
                break
            except EtcdError as error:
                log.debug("the record of service cannot be read yet: %s", error.message)
                await asyncio.sleep(backoff.next_s())
        if found is not None:
            self._inherited(ServiceInherited(registry.service_record(found.value)))

    async def write(self, counters: list[registry_pb2.TenantService]) -> bool:
        """Whether it was written: only the leader of this term may."""
        term = self._term()
        record = registry_pb2.ServiceRecord(term=term, tenants=counters)
        # Thousands of counters take milliseconds to write out, for which no stream should wait.
        value = await asyncio.to_thread(registry.to_bytes, record)
        mine = Compare(registry.LEADER, "create_revision", "==", term)
        return (await self._client.txn([mine], [Put(registry.SERVICE, value)])).succeeded
