"""Members of a simulated etcd: they answer slowly, late or not at all, lose their leader, and sometimes lie."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from llmos.etcd import messages as pb
from llmos.etcd import rpcs
from tests.sim.etcd_store import EtcdStore, LeaseNotFound, in_range
from tests.sim.network import Network, SimServer
from tests.sim.vloop import NOWHERE, Node, VirtualLoop

MEMBERS = 3
_EXPIRY_S = 0.5
_REQUEST_LIMIT_S = 5.0
_LOOK_S = 0.05
_NO_LEADER_S = 2.0
Answer = Callable[[Any], Any]


class EtcdCluster:
    """One store behind three members. Every fault is a method; `members` are nodes, to be frozen and cut off."""

    def __init__(self, loop: VirtualLoop, network: Network, rng: random.Random) -> None:
        self.store = EtcdStore()
        self.members = [Node(f"etcd{number}") for number in range(MEMBERS)]
        self.endpoints = tuple(f"{member.name}:1" for member in self.members)
        self.lying = False
        """Renewals of leases that are gone are reported as granted."""
        self.unheard = 0
        """So many of the next writes take effect though their answer is lost."""
        self.slow_s = 0.0
        self.lag_s = {member.name: 0.0 for member in self.members}
        """How far a member's watches are behind."""
        self._loop, self._network, self._rng = loop, network, rng
        self._leaderless_until = 0.0
        self._had_quorum = True

    async def start(self) -> None:
        """Listen, and let leases run out, until cancelled."""
        for member in self.members:
            self._loop.spawn(member, self._serve(member), member.name)
        while True:
            await asyncio.sleep(_EXPIRY_S)
            if not self.has_leader:
                self._had_quorum = False
                continue
            if not self._had_quorum:
                self._had_quorum = True
                self.store.renew_all(self._loop.now)
            self.store.expire(self._loop.now)

    @property
    def has_leader(self) -> bool:
        """Writes can be agreed on."""
        alive = sum(not member.asleep for member in self.members)
        return alive > MEMBERS // 2 and self._loop.now >= self._leaderless_until

    def lose_leader(self, seconds: float) -> None:
        """An election inside etcd; the new leader renews every lease."""
        self._leaderless_until = self._loop.now + seconds
        self._had_quorum = False

    async def _serve(self, member: Node) -> None:
        server = SimServer(self._network, member.name, 1)
        unary: dict[rpcs.Rpc, tuple[Any, Answer]] = {
            rpcs.RANGE: (pb.RangeRequest, self.store.range),
            rpcs.PUT: (pb.PutRequest, self.store.put),
            rpcs.DELETE_RANGE: (pb.DeleteRangeRequest, self.store.delete_range),
            rpcs.TXN: (pb.TxnRequest, self.store.txn),
            rpcs.LEASE_GRANT: (pb.LeaseGrantRequest, self._grant),
            rpcs.LEASE_REVOKE: (pb.LeaseRevokeRequest, self._revoke),
        }
        for rpc, (request, answer) in unary.items():
            self._add(server, rpc, grpc.unary_unary_rpc_method_handler, request, self._unary(answer))
        self._add(
            server, rpcs.LEASE_KEEP_ALIVE, grpc.unary_stream_rpc_method_handler, pb.LeaseKeepAliveRequest, self._renew
        )
        watch = Watching(self, member.name).serve
        self._add(server, rpcs.WATCH, grpc.stream_stream_rpc_method_handler, pb.WatchRequest, watch)
        await server.start()

    @staticmethod
    def _add(server: SimServer, rpc: rpcs.Rpc, make: Any, request: Any, behaviour: Any) -> None:
        service, method = rpc.path.strip("/").split("/")
        handler = make(behaviour, request.FromString, lambda message: message.SerializeToString())
        server.add_registered_method_handlers(service, {method: handler})

    def _unary(self, answer: Answer) -> Any:
        async def call(request: Any, context: Any) -> Any:
            await self.agree(context)
            lost = self.unheard > 0 and not isinstance(request, pb.RangeRequest)
            try:
                message = answer(request)
            except LeaseNotFound:
                await context.abort(grpc.StatusCode.NOT_FOUND, "etcdserver: requested lease not found")
            if lost:
                self.unheard -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "etcdserver: request timed out")
            return message

        return call

    async def agree(self, context: Any) -> None:
        """Wait until the members agree; give up after etcd's own limit."""
        await asyncio.sleep(self._rng.uniform(0.001, 0.003) + self.slow_s)
        limit = self._loop.now + _REQUEST_LIMIT_S
        while not self.has_leader:
            if self._rng.random() < 0.05:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "etcdserver: leader changed")
            if self._loop.now > limit:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "etcdserver: request timed out")
            await asyncio.sleep(_LOOK_S)

    def _grant(self, request: Any) -> Any:
        return self.store.grant(request.TTL, self._loop.now)

    def _revoke(self, request: Any) -> Any:
        self.store.revoke(request.ID)
        return pb.LeaseRevokeResponse(header=self.store.header())

    async def _renew(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self.agree(context)
        yield self.store.keep_alive(request.ID, self._loop.now, lie=self.lying)


class Watching:
    """The Watch service of one member."""

    def __init__(self, cluster: EtcdCluster, member: str) -> None:
        self._cluster = cluster
        self._member = member

    async def serve(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """One stream with one watch, as our client uses it."""
        cluster, loop = self._cluster, asyncio.get_running_loop()
        opening = await anext(requests, None)
        if opening is None:
            return
        first, last_at = opening.create_request, 0.0
        store = cluster.store
        answers: deque[Any] = deque([pb.WatchResponse(header=store.header(), created=True)])
        ready = asyncio.Event()

        def say(answer: Any) -> None:
            answers.append(answer)
            ready.set()

        def heard(revision: int, events: list[Any]) -> None:
            nonlocal last_at
            mine = [event for event in events if in_range(event.kv.key, first.key, first.range_end)]
            if mine and revision >= first.start_revision:
                answer = pb.WatchResponse(header=pb.ResponseHeader(revision=revision), events=mine)
                last_at = max(last_at, loop.time() + cluster.lag_s[self._member])
                loop.call_at(last_at, say, answer, context=NOWHERE)

        if first.start_revision and first.start_revision <= store.compacted:
            say(pb.WatchResponse(header=store.header(), canceled=True, compact_revision=store.compacted))
        else:
            for revision, events in store.since(first.start_revision) if first.start_revision else ():
                heard(revision, events)
            store.listeners.append(heard)
        reader = asyncio.create_task(self._read(requests, say), name="etcd-watch-requests")
        try:
            while not reader.done():
                while answers:
                    yield answers.popleft()
                ready.clear()
                await self._wait(ready, context)
        finally:
            reader.cancel()
            if heard in store.listeners:
                store.listeners.remove(heard)

    async def _wait(self, ready: asyncio.Event, context: Any) -> None:
        """For the next answer; a stream without a leader for long ends."""
        cluster, loop = self._cluster, asyncio.get_running_loop()
        alone_since = loop.time()
        while not ready.is_set():
            try:
                async with asyncio.timeout(1.0):
                    await ready.wait()
            except TimeoutError:
                if cluster.has_leader:
                    alone_since = loop.time()
                elif loop.time() - alone_since > _NO_LEADER_S:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "etcdserver: no leader")

    async def _read(self, requests: AsyncIterator[Any], say: Callable[[Any], None]) -> None:
        async for request in requests:
            if request.WhichOneof("request_union") == "progress_request":
                say(pb.WatchResponse(header=self._cluster.store.header()))
