"""The client: keys, transactions, leases and watches over whichever endpoint lives."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Self

from llmos.clock import Clock
from llmos.etcd import kv
from llmos.etcd.backoff import Backoff
from llmos.etcd.config import EtcdConfig
from llmos.etcd.endpoint import open_channel
from llmos.etcd.kv import Compare, Delete, Get, KeyValue, Operation, Put, TxnResult
from llmos.etcd.lease import Lease, grant
from llmos.etcd.rpcs import DELETE_RANGE, PUT, RANGE, TXN
from llmos.etcd.transport import Connect, Transport
from llmos.etcd.watch import Watch


class EtcdClient:
    """An asyncio client of one etcd cluster. Use it as `async with EtcdClient(...) as client:`.

    It connects on first use, so it can be opened while etcd is down. Every call takes `timeout_s` (default: the
    configured `call_timeout_s`) and raises EtcdUnavailable when no endpoint answered in time, EtcdAuthFailed when etcd
    refused the credentials, LeaseLost for a write under a lease that is gone, EtcdError for what else etcd refuses.

    Reads go through consensus. After EtcdUnavailable the outcome of a write is unknown: it may even take effect later,
    when a frozen member thaws. `put` and `delete` are sent again until answered; `txn` and `compare_and_swap` are sent
    once. What decides something goes through these two, whose conditions stop one that comes late.

    The client owns the tasks of its leases and the streams of its watches; leaving the block ends them. Leases are not
    revoked by that, they run out.
    """

    def __init__(self, config: EtcdConfig, clock: Clock, rng: random.Random, connect: Connect = open_channel) -> None:
        """`connect` opens the channels to the endpoints."""
        self.clock = clock
        self._transport = Transport(config, clock, rng, connect)
        self._leases: set[Lease] = set()
        self._watches: set[Watch] = set()

    async def __aenter__(self) -> Self:
        self._transport.open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for watch in list(self._watches):
            await watch.aclose()
        for lease in list(self._leases):
            await lease.close()
        self._leases.clear()
        await self._transport.close()

    async def put(self, key: str, value: bytes, lease_id: int = 0, *, timeout_s: float | None = None) -> int:
        """Write `value` under a lease (0: none); return the revision."""
        request = kv.put_request(Put(key, value, lease_id))
        answer = await self._transport.call(PUT, request, timeout_s=timeout_s)
        return int(answer.header.revision)

    async def get(self, key: str, *, timeout_s: float | None = None) -> KeyValue | None:
        """Read one key; None if it does not exist."""
        found, _ = await self._range(Get(key), timeout_s)
        return found[0] if found else None

    async def get_prefix(self, prefix: str, *, timeout_s: float | None = None) -> tuple[list[KeyValue], int]:
        """Read every key that starts with `prefix`, in the order of keys, and the revision at which that was so."""
        return await self._range(Get(prefix, prefix=True), timeout_s)

    async def delete(self, key: str, *, timeout_s: float | None = None) -> bool:
        """Delete one key; return whether it existed."""
        return await self._delete(Delete(key), timeout_s) > 0

    async def delete_prefix(self, prefix: str, *, timeout_s: float | None = None) -> int:
        """Delete every key that starts with `prefix`; return how many there were."""
        return await self._delete(Delete(prefix, prefix=True), timeout_s)

    async def txn(
        self,
        compares: Sequence[Compare],
        then: Sequence[Operation],
        otherwise: Sequence[Operation] = (),
        *,
        timeout_s: float | None = None,
    ) -> TxnResult:
        """If all `compares` hold, run `then`, else `otherwise`, in one revision."""
        request = kv.txn_request(compares, then, otherwise)
        return kv.txn_result(await self._transport.call(TXN, request, timeout_s=timeout_s, repeatable=False))

    async def compare_and_swap(
        self,
        key: str,
        expected_mod_revision: int,
        value: bytes,
        lease_id: int = 0,
        *,
        timeout_s: float | None = None,
    ) -> bool:
        """Write `value` if the key's last change is the expected one (0: it does not exist); return whether it was."""
        unchanged = Compare(key, "mod_revision", "==", expected_mod_revision)
        result = await self.txn([unchanged], [Put(key, value, lease_id)], timeout_s=timeout_s)
        return result.succeeded

    async def lease(self, ttl_s: float, *, timeout_s: float | None = None) -> Lease:
        """Get a lease and keep it alive. Seconds; etcd rounds up and grants about 2 at least."""
        self._leases = {lease for lease in self._leases if not lease.lost.is_set()}
        lease = await grant(self._transport, ttl_s, timeout_s)
        self._leases.add(lease)
        return lease

    def watch(self, prefix: str, start_revision: int | None = None) -> Watch:
        """Watch every key that starts with `prefix`: a snapshot first, or the changes from `start_revision` on."""
        return self._watch(prefix, start_revision, prefix=True)

    def watch_key(self, key: str, start_revision: int | None = None) -> Watch:
        """Watch one key; otherwise like `watch`."""
        return self._watch(key, start_revision, prefix=False)

    def backoff(self) -> Backoff:
        """A back-off for a caller's own loop, with the client's randomness."""
        return self._transport.backoff()

    def _watch(self, key: str, start_revision: int | None, *, prefix: bool) -> Watch:
        watch = Watch(
            self._transport, key, prefix=prefix, start_revision=start_revision, on_close=self._watches.discard
        )
        self._watches.add(watch)
        return watch

    async def _range(self, get: Get, timeout_s: float | None) -> tuple[list[KeyValue], int]:
        answer = await self._transport.call(RANGE, kv.get_request(get), timeout_s=timeout_s)
        return [kv.key_value(raw) for raw in answer.kvs], answer.header.revision

    async def _delete(self, delete: Delete, timeout_s: float | None) -> int:
        answer = await self._transport.call(DELETE_RANGE, kv.delete_request(delete), timeout_s=timeout_s)
        return int(answer.deleted)
