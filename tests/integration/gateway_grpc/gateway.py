"""A gateway's inner half with its gRPC edge, in the test's own process."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from gateway.catalogue import Catalogue
from gateway.grpc_edge import UnreadableInterceptor
from gateway.grpc_fleet import FleetServicer
from gateway.grpc_service import InferenceServicer
from gateway.leader import LeaderClient
from gateway.link import Link, LinkConfig
from gateway.session import Sessions
from gateway.session_config import SessionConfig
from gateway.stream import Stream
from gateway.types import Delta, Done, Event, GenerationRequest, Identity, Params, Started, TraceHeaders
from llmos.clock import Clock, SystemClock
from llmos.errors import Unauthenticated
from llmos.rpc import RpcServer, open_channel
from llmos.telemetry import Telemetry
from llmos.v1 import fleet_pb2, fleet_pb2_grpc, inference_pb2_grpc

WAIT_S = 10.0
ALICE = Identity("alice")
BOB = Identity("bob")
OPERATOR = Identity("ops", role="operator")
KEYS = {"Bearer alice": ALICE, "Bearer bob": BOB, "Bearer ops": OPERATOR}


class Keys:
    """An authenticator that knows three keys."""

    def authenticate(self, authorization: str | None) -> Identity:
        if authorization not in KEYS:
            raise Unauthenticated("No such key.")
        return KEYS[authorization]


@dataclass
class Gateway:
    """What a test may touch."""

    link: Link
    sessions: Sessions
    catalogue: Catalogue
    channel: grpc.aio.Channel

    @property
    def inference(self) -> Any:
        return inference_pb2_grpc.InferenceStub(self.channel)

    @property
    def fleet(self) -> Any:
        return fleet_pb2_grpc.FleetStub(self.channel)

    async def ready(self) -> None:
        """Wait for a leader and its catalogue."""
        await eventually(self.sessions.ready)

    async def chat(self, text: str = "hi", identity: Identity = ALICE, request_id: str = "", **params: Any) -> Stream:
        """Start a completion of the echo model."""
        request = GenerationRequest("completion", "echo", Params(**({"max_tokens": 8} | params)), text=text)
        return await self.sessions.generate(request, identity, request_id=request_id, trace=TraceHeaders())


async def eventually(condition: Callable[[], object]) -> None:
    """Wait for something that no event announces."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(
    *schedulers: str,
    session: SessionConfig | None = None,
    clock: Clock | None = None,
    connect: Callable[[str], grpc.aio.Channel] = open_channel,
    prefetch: bool = False,
    **link_options: Any,
) -> AsyncIterator[Gateway]:
    """A gateway linked to these schedulers."""
    clock = clock or SystemClock()
    telemetry = Telemetry("gateway", "g1", clock=clock)
    options = {"hello_timeout_s": 1.0, "backoff_min_s": 0.01, "backoff_max_s": 0.05} | link_options
    node = fleet_pb2.Node(id="g1", role=fleet_pb2.NODE_ROLE_GATEWAY)
    link = Link(
        LinkConfig(schedulers, **options),
        node,
        connect=connect,
        spans=telemetry.drain,
        clock=clock,
        rng=random.Random(1),
    )
    leader = LeaderClient(link.leader_channel)
    catalogue = Catalogue(leader.fetch_blob)
    sessions = Sessions(link, catalogue, session or SessionConfig(), clock=clock, telemetry=telemetry, leader=leader)
    server = RpcServer("127.0.0.1", 0, interceptors=[UnreadableInterceptor()])
    server.add(
        inference_pb2_grpc.add_InferenceServicer_to_server, InferenceServicer(sessions, Keys()), "llmos.v1.Inference"
    )
    server.add(fleet_pb2_grpc.add_FleetServicer_to_server, FleetServicer(leader, Keys()), "llmos.v1.Fleet")
    port = await server.start()
    tasks = [asyncio.create_task(link.run(sessions))]
    if prefetch:
        tasks.append(asyncio.create_task(catalogue.prefetch()))
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            gateway = Gateway(link, sessions, catalogue, channel)
            yield gateway
    finally:
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, asyncio.CancelledError), outcome
        await server.stop(0)


async def collect(stream: Stream) -> list[Event]:
    """All events to the end."""
    async with asyncio.timeout(WAIT_S):
        return [event async for event in stream.events()]


def text_of(events: Sequence[Event], choice: int = 0) -> str:
    """A choice's text."""
    return "".join(event.text for event in events if isinstance(event, Delta) and event.choice == choice)


def tokens_of(events: Sequence[Event], choice: int = 0) -> list[int]:
    """A choice's tokens."""
    deltas = [event for event in events if isinstance(event, Delta) and event.choice == choice]
    return [token_id for delta in deltas for token_id in delta.token_ids]


def ends(events: Sequence[Event]) -> tuple[Started, Done]:
    """The first and the last event."""
    first, last = events[0], events[-1]
    assert isinstance(first, Started)
    assert isinstance(last, Done)
    return first, last
