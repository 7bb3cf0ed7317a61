"""A model of the network between nodes: delay, order within a stream only, stalls, resets, one-way partitions.

It stands where grpc.aio stands: `Network.channel` gives what `open_channel` gives, `SimServer` is what `RpcServer` is,
so that the services' own stubs, servicers and streams run on it. Messages are serialized on one side and parsed on the
other. What grpc.aio does when a call ends, breaks or is cancelled is modelled after its source (grpc/aio/_call.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from tests.sim.calls import Broken, Call, ClientCall, Methods, Status, serve
from tests.sim.trace import Trace
from tests.sim.vloop import NOWHERE, Node, VirtualLoop, current_node

_HEALTH = "/grpc.health.v1.Health/Check"
_KEEPALIVE_S = 10.0
_SERVER_KEEPALIVE_S = 30.0


@dataclass(slots=True)
class Weather:
    """How fast messages travel."""

    least_s: float = 0.001
    spread_s: float = 0.004
    """Exponential, beside the least."""


@dataclass(eq=False, slots=True)
class _Bound:
    node: Node
    methods: Methods


class SimServer:
    """Implements what the services use of `llmos.rpc.RpcServer`."""

    def __init__(self, network: Network, host: str, port: int) -> None:
        self._network = network
        self._methods: Methods = {_HEALTH: _health_handler()}
        self.host, self.port = host, port

    def add(self, add_to_server: Callable[[Any, Any], None], servicer: object, name: str) -> None:
        """See `RpcServer`."""
        add_to_server(servicer, self)

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """For generated code; the next method gets the same."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """For generated code."""
        self._methods.update({f"/{service}/{name}": handler for name, handler in handlers.items()})

    async def start(self) -> int:
        """See `RpcServer`."""
        node = current_node()
        assert node is not None
        self._network.listen(f"{self.host}:{self.port}", node, self._methods)
        return self.port

    async def set_serving(self, serving: bool) -> None:
        """See `RpcServer`."""

    async def stop(self, grace_s: float) -> None:
        """See `RpcServer`."""
        self._network.unlisten(f"{self.host}:{self.port}")


def _health_handler() -> Any:
    async def check(request: Any, context: Any) -> Any:
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    return grpc.unary_unary_rpc_method_handler(
        check, health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString
    )


@dataclass(eq=False)
class Network:
    """All wires. Faults act on directed pairs of nodes, by name."""

    loop: VirtualLoop
    rng: random.Random
    trace: Trace
    weather: Weather = field(default_factory=Weather)
    bound: dict[str, _Bound] = field(default_factory=dict)
    blocked: set[tuple[str, str]] = field(default_factory=set)
    slow: dict[tuple[str, str], float] = field(default_factory=dict)
    """Further seconds on the way."""
    calls: dict[int, Call] = field(default_factory=dict)
    hosts: dict[str, str] = field(default_factory=dict)
    """Names of nodes by their address without the port."""
    serial: int = 0

    def listen(self, address: str, node: Node, methods: Methods) -> None:
        """Calls to an address reach this node from now on."""
        self.bound[address] = _Bound(node, methods)

    def unlisten(self, address: str) -> None:
        """Nobody listens there any more; open calls end."""
        bound = self.bound.pop(address, None)
        if bound is not None:
            for call in [call for call in self.calls.values() if call.server is bound.node]:
                call.break_off("the server shuts down")

    def channel(self, address: str, tls: Any = None) -> SimChannel:
        """What `open_channel` gives."""
        node = current_node()
        assert node is not None
        return SimChannel(self, node, address)

    def delay_s(self, source: str, target: str) -> float:
        """How long the next message takes."""
        weather = self.weather
        return weather.least_s + self.rng.expovariate(1 / weather.spread_s) + self.slow.get((source, target), 0.0)

    def is_blocked(self, source: str, target: str) -> bool:
        """Nothing passes in this direction."""
        return (source, target) in self.blocked

    # Faults

    def block(self, source: str, target: str) -> None:
        """A partition of one direction. Messages wait, as TCP repeats them; long ones are noticed by keep-alive."""
        self.blocked.add((source, target))
        for call in list(self.calls.values()):
            if {call.client.name, call.server_name} == {source, target}:
                self._expect_keepalive(call)

    def unblock(self, source: str, target: str) -> None:
        """The direction is open again; what waited arrives."""
        self.blocked.discard((source, target))
        for call in list(self.calls.values()):
            call.release(source, target)

    def reset(self, one: str, other: str) -> None:
        """Every connection between the two breaks."""
        for call in list(self.calls.values()):
            if {call.client.name, call.server_name} == {one, other}:
                call.break_off("connection reset")

    def stall(self, one: str, other: str, seconds: float) -> None:
        """What is under way on one stream between the two stands still; others go on."""
        calls = [call for call in self.calls.values() if {call.client.name, call.server_name} == {one, other}]
        if calls:
            call = calls[self.rng.randrange(len(calls))]
            call.stall()
            self.loop.call_later(seconds, call.unstall, context=NOWHERE)

    def damage(self, source: str, target: str) -> None:
        """One message that is under way on a stream cannot be parsed any more."""
        for call in self.calls.values():
            if (call.server_name, call.client.name) == (source, target) and call.status is None:
                call.down.damage_next = True
                return

    def drop_node(self, node: Node) -> None:
        """The node was killed: its sockets are closed by its system."""
        self.bound = {address: bound for address, bound in self.bound.items() if bound.node is not node}
        for call in list(self.calls.values()):
            if node in (call.client, call.server):
                call.orphan(node)

    # Calls

    def open(self, call: Call) -> None:
        """Enter a call and carry its beginning to the server."""
        self.serial += 1
        call.number = self.serial
        self.calls[call.number] = call
        if self.is_blocked(call.client.name, call.server_name) or self.is_blocked(call.server_name, call.client.name):
            self._expect_keepalive(call)
        call.connect()

    def accept(self, call: Call) -> None:
        """A call has reached its address."""
        bound = self.bound.get(call.address)
        if bound is None or bound.node.dead:
            call.break_off("connection refused")
            return
        handler = bound.methods.get(call.path)
        call.server = bound.node
        if handler is None:
            call.answer(Status(grpc.StatusCode.UNIMPLEMENTED, call.path))
            return
        call.task = self.loop.spawn(bound.node, serve(call, handler), f"call-{call.number}")

    def forget(self, call: Call) -> None:
        """Both ends know that it is over."""
        self.calls.pop(call.number, None)

    def name_at(self, address: str) -> str:
        """Name of the node that listens, or used to listen, at an address."""
        host = address.rpartition(":")[0]
        return self.hosts.get(host, host)

    def _expect_keepalive(self, call: Call) -> None:
        self.loop.call_later(_KEEPALIVE_S, self._keepalive, call, False, context=NOWHERE)
        self.loop.call_later(_SERVER_KEEPALIVE_S, self._keepalive, call, True, context=NOWHERE)

    def _keepalive(self, call: Call, server: bool) -> None:
        one, other = call.client.name, call.server_name
        if call.number in self.calls and (self.is_blocked(one, other) or self.is_blocked(other, one)):
            if server:
                call.lose_server()
            else:
                call.lose_client("keepalive timed out")


class SimChannel:
    """What the services use of `grpc.aio.Channel`."""

    def __init__(self, network: Network, node: Node, address: str) -> None:
        self._network = network
        self._node = node
        self._address = address
        self._calls: list[ClientCall] = []

    async def __aenter__(self) -> SimChannel:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Cancels what is open."""
        for call in self._calls:
            call.cancel()
        self._calls.clear()

    def _call(self, path: str, serialize: Any, deserialize: Any, timeout_s: float | None) -> ClientCall:
        call = Call(self._network, self._node, self._address, path)
        client = ClientCall(call, serialize, deserialize)
        self._calls = [one for one in self._calls if not one.done()]
        self._calls.append(client)
        self._network.open(call)
        if timeout_s is not None:
            client.expire_in(timeout_s)
        return client

    def stream_stream(
        self, path: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., ClientCall]:
        """A multi-callable."""

        def start(timeout: float | None = None, metadata: Any = None) -> ClientCall:
            return self._call(path, request_serializer, response_deserializer, timeout)

        return start

    def unary_stream(
        self, path: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., ClientCall]:
        """A multi-callable."""

        def start(request: Any, timeout: float | None = None, metadata: Any = None) -> ClientCall:
            call = self._call(path, request_serializer, response_deserializer, timeout)
            call.say_all(request)
            return call

        return start

    def unary_unary(
        self, path: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., Any]:
        """A multi-callable."""

        async def start(request: Any, timeout: float | None = None, metadata: Any = None) -> Any:
            call = self._call(path, request_serializer, response_deserializer, timeout)
            call.say_all(request)
            answer = await call.read()
            if answer is grpc.aio.EOF:
                raise Broken(grpc.StatusCode.INTERNAL, "no answer")
            return answer

        return start
