"""The core among simulated gateways and workers: no transport, no time but the test's, every message checked.

Messages travel in order per stream and wait until the test delivers them, so that a test decides who is early. A broken
stream loses what was on its way.
"""

from __future__ import annotations

from llmos.internal.v1 import request_pb2
from llmos.v1 import fleet_pb2
from scheduler import commands, events
from scheduler.core import Core
from scheduler.policy import Policy
from tests.fakes.contract import (
    GIB,
    MODEL,
    VERSION,
    Client,
    SimGateway,
    SimWorker,
    make_record,
    make_request,
    token,
)

__all__ = ["GIB", "MODEL", "VERSION", "Arena", "make_record", "make_request", "token"]


class Arena:
    """One core and the world around it."""

    def __init__(self, policy: Policy | None = None, term: int = 7) -> None:
        self.now = 1000.0
        self.policy = policy or Policy()
        self.core = Core("s1", term, self.policy, self.now)
        self.workers: dict[str, SimWorker] = {}
        self.gateways: dict[str, SimGateway] = {}
        self.links: set[str] = set()
        self.notes: list[commands.Command] = []
        self.commands: list[commands.Command] = []
        self._streams = 0

    # -- the world ---------------------------------------------------------------------------------------------------

    def post(self, event: events.Event) -> list[commands.Command]:
        """Hand an event to the core and put its commands on their way."""
        issued = self.core.handle(event, self.now)
        for command in issued:
            self._carry(command)
        self.commands += issued
        self.check_blocks()
        return issued

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.post(events.Tick())

    def add_worker(
        self,
        worker_id: str,
        blocks: int = 64,
        *,
        loaded: bool = True,
        memory: int = 16 * GIB,
        adapters: tuple[str, ...] = (),
    ) -> SimWorker:
        """Register and attach a worker. Its adapters are there and not loaded."""
        worker = self.workers[worker_id] = SimWorker(worker_id, blocks, loaded=loaded)
        worker.adapters = dict.fromkeys(adapters, False)
        self.post(events.WorkerRegistered(make_record(worker_id, memory=memory, adapters=adapters)))
        self.attach(worker_id)
        return worker

    def attach(self, worker_id: str) -> None:
        worker = self.workers[worker_id]
        worker.inbox.clear()
        worker.sequence = 0
        self.links.add(worker_id)
        self.post(events.WorkerAttached(worker_id, worker.report()))

    def detach(self, worker_id: str, *, damaged: bool = False) -> None:
        """The stream breaks: orders on their way are lost, the worker computes on."""
        self.links.discard(worker_id)
        self.workers[worker_id].inbox.clear()
        self.post(events.WorkerDetached(worker_id, "test", damaged))

    def kill(self, worker_id: str) -> None:
        """The worker is gone for good."""
        self.detach(worker_id)
        del self.workers[worker_id]
        self.post(events.WorkerDeregistered(worker_id))

    def connect(self, gateway_id: str = "g1") -> SimGateway:
        """Open a stream; whatever is unfinished is submitted again."""
        gateway = self.gateways.setdefault(gateway_id, SimGateway(gateway_id))
        self._streams += 1
        gateway.stream_id = self._streams
        gateway.inbox.clear()
        node = fleet_pb2.Node(id=gateway_id, role=fleet_pb2.NODE_ROLE_GATEWAY)
        self.post(events.GatewayConnected(gateway.stream_id, node))
        for request in gateway.unfinished():
            self.post(events.Submitted(gateway.stream_id, request))
        return gateway

    def disconnect(self, gateway_id: str = "g1") -> None:
        gateway = self.gateways[gateway_id]
        gateway.inbox.clear()
        lost, gateway.stream_id = gateway.stream_id, 0
        self.post(events.GatewayLost(lost))

    def submit(self, request: request_pb2.Request, gateway_id: str = "g1") -> Client:
        gateway = self.gateways[gateway_id]
        client = Client(request, [[] for _ in range(request.choices)], [False] * request.choices)
        gateway.clients[request.request_id] = client
        if gateway.stream_id:
            self.post(events.Submitted(gateway.stream_id, request))
        return client

    def cancel(self, request_id: str, gateway_id: str = "g1") -> None:
        gateway = self.gateways[gateway_id]
        gateway.clients[request_id].cancelled = True
        self.post(events.Cancelled(gateway.stream_id, request_id, "client_gone"))

    def new_leader(self, term: int) -> None:
        """Another scheduler is elected: streams to the old one are gone, it knows nothing but what it is told."""
        self.core = Core("s2", term, self.policy, self.now)
        for worker in self.workers.values():
            worker.inbox.clear()
            self.post(events.WorkerRegistered(make_record(worker.id, adapters=tuple(worker.adapters))))
        self.links.clear()
        self.post(events.MembersListed())
        for gateway in self.gateways.values():
            gateway.stream_id = 0
            gateway.inbox.clear()

    # -- delivery ----------------------------------------------------------------------------------------------------

    def deliver_orders(self, worker_id: str) -> None:
        worker = self.workers[worker_id]
        while worker.inbox:
            worker.obey(worker.inbox.popleft())

    def deliver_output(self, gateway_id: str = "g1") -> None:
        gateway = self.gateways[gateway_id]
        while gateway.inbox:
            gateway.take(gateway.inbox.popleft())

    def step(self, worker_id: str) -> None:
        """The worker's engine takes a step; its frame is lost if the stream is broken."""
        frame = self.workers[worker_id].step()
        if worker_id in self.links:
            self.post(events.WorkerFrame(worker_id, frame))

    def run(self, steps: int = 200) -> None:
        """Everybody works until nothing is left to do, at most `steps` steps."""
        for _ in range(steps):
            for worker_id in list(self.workers):
                self.deliver_orders(worker_id)
                self.step(worker_id)
            for gateway_id in self.gateways:
                self.deliver_output(gateway_id)
            self.advance(0.05)
            if not self.core.state.requests:
                return

    # -- checks ------------------------------------------------------------------------------------------------------

    def check_blocks(self) -> None:
        """Placement never exceeds the totals, and what it holds is what its attempts hold."""
        for worker in self.core.state.workers.values():
            for slot in worker.slots.values():
                mine = [attempt for attempt in worker.running.values() if attempt.model == slot.key[0]]
                assert slot.held == sum(attempt.blocks for attempt in mine)
                assert slot.promised == sum(attempt.promised for attempt in mine)
                if slot.total_blocks:
                    assert slot.held <= slot.total_blocks

    def check_idle(self) -> None:
        """Nothing is left behind once every request has ended."""
        state = self.core.state
        assert not state.requests and not state.parked and not len(state.waiting) and not state.claims
        assert all(not ids for ids in state.by_stream.values())
        for queue in state.waiting.queues():
            assert not any(one.busy or one.waiting or one.tokens or one.weights for one in queue.classes)
        for worker in state.workers.values():
            assert not worker.running and not worker.unclaimed
            assert all(slot.held == 0 and slot.promised == 0 for slot in worker.slots.values())

    def issued(self, kind: type) -> list[commands.Command]:
        return [command for command in self.commands if isinstance(command, kind)]

    def _carry(self, command: commands.Command) -> None:
        if isinstance(command, (commands.StartAttempt, commands.Order)):
            worker = self.workers.get(command.worker_id)
            if worker is not None and command.worker_id in self.links:
                order = command.dispatch if isinstance(command, commands.StartAttempt) else command.command
                worker.inbox.append(order)
        elif isinstance(command, (commands.SendOutput, commands.SendFailure)):
            gateway = self._gateway(command.stream_id)
            if gateway is not None:
                gateway.inbox.append(command.output if isinstance(command, commands.SendOutput) else command.failure)
        elif isinstance(command, commands.SendClass):
            gateway = self._gateway(command.stream_id)
            if gateway is not None:
                gateway.inbox.append(command.change)
        elif isinstance(command, commands.SendCatalogue):
            gateway = self._gateway(command.stream_id)
            if gateway is not None:
                gateway.catalogue = command.catalogue

    def _gateway(self, stream_id: int) -> SimGateway | None:
        return next((g for g in self.gateways.values() if g.stream_id == stream_id), None)
