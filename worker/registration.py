"""Membership: the worker's record in etcd, under a lease. Serving never depends on it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable

from google.protobuf import json_format

from llmos.errors import EtcdError
from llmos.etcd import EtcdClient
from llmos.internal.v1 import registry_pb2
from llmos.lifetime import first_of

log = logging.getLogger(__name__)

PREFIX = "/llmos/v1/workers/"
_JITTER_S = 1.0
"""Workers that lost their leases together come back spread over this time."""


class Registration:
    """Keeps the record in etcd as long as `run` runs, through lost leases and outages."""

    def __init__(
        self, client: EtcdClient, record: registry_pb2.WorkerRecord, *, lease_ttl_s: float, rng: random.Random
    ) -> None:
        self._client = client
        self._key = PREFIX + record.worker_id
        self._record = record
        self._changed = asyncio.Event()
        self._lease_ttl_s = lease_ttl_s
        self._rng = rng
        self.registered = asyncio.Event()
        """Set while the record is there, as far as this side knows."""

    def add(self, models: Iterable[registry_pb2.ModelRecord]) -> None:
        """Put more models into the record."""
        self._record.models.extend(models)
        self._changed.set()

    async def run(self) -> None:
        """Register, again whenever the lease is lost. Cancelling it takes the record out, if etcd answers."""
        backoff = self._client.backoff()
        while True:
            try:
                await self._hold()
            except EtcdError as error:
                log.warning("not registered in etcd: %s", error.message)
                await asyncio.sleep(backoff.next_s())
            else:
                backoff.reset()
                log.warning("the lease of %s was lost; registering again", self._key)
                await asyncio.sleep(self._rng.uniform(0.0, _JITTER_S))

    async def _hold(self) -> None:
        """Write the record under a lease, again when it changes, until that is lost. It is revoked on the way out."""
        async with await self._client.lease(self._lease_ttl_s) as lease:
            try:
                while not lease.lost.is_set():
                    self._changed.clear()
                    await self._client.put(self._key, self._value(), lease.id)
                    self.registered.set()
                    await first_of(lease.lost, self._changed)
            finally:
                self.registered.clear()

    def _value(self) -> bytes:
        return json_format.MessageToJson(self._record, preserving_proto_field_name=True, indent=None).encode()
