"""The real scheduler core as a dispatcher: its events are made of what happens here, its commands are obeyed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from bench.simulated.engine import Engine, Step
from bench.simulated.fleet import Order, Reject, Start, Stop
from bench.simulated.traffic import Request
from llmos.internal.v1 import registry_pb2, request_pb2, requests_pb2, work_pb2
from llmos.v1 import fleet_pb2, inference_pb2
from scheduler import commands, events
from scheduler.core import Core
from scheduler.policy import Policy

MODEL, VERSION = "model", "1"
_GIB = 1 << 30
_STREAM = 1
_CONTEXT = 8192
_PRIORITY = {
    request_pb2.PRIORITY_CLASS_INTERACTIVE: 0,
    request_pb2.PRIORITY_CLASS_STANDARD: 1,
    request_pb2.PRIORITY_CLASS_BATCH: 2,
}
"""As `worker/wire.py` tells the engine."""


class Scheduled:
    """Implements `Dispatcher`. Workers are numbered; the core knows each by its number as a string."""

    tick_s = 0.05
    naming = True

    def __init__(self, engines: Sequence[Engine], policy: Policy) -> None:
        self.core = Core("scheduler", 1, policy, 0.0)
        self._frames = [itertools.count(1) for _ in engines]
        self._changes = [itertools.count(1) for _ in engines]
        self._free = [engine.manager.free for engine in engines]
        self._outputs: dict[str, request_pb2.Output] = {}
        """The next output of each running request."""
        node = fleet_pb2.Node(id="gateway", role=fleet_pb2.NODE_ROLE_GATEWAY)
        self._post(events.GatewayConnected(_STREAM, node), 0.0)
        for number, engine in enumerate(engines):
            self._post(events.WorkerRegistered(_record(str(number))), 0.0)
            report = work_pb2.WorkerReport(
                worker_id=str(number), models=[_node_model(engine)], numerics_fingerprint="same"
            )
            self._post(events.WorkerAttached(str(number), report), 0.0)
        self._post(events.MembersListed(), 0.0)

    def submitted(self, request: Request, now: float) -> Iterable[Order]:
        """See `Dispatcher`."""
        return self._post(events.Submitted(_STREAM, _message(request)), now)

    def stepped(self, worker: int, step: Step, engine: Engine, now: float) -> Iterable[Order]:
        """See `Dispatcher`."""
        return self._post(events.WorkerFrame(str(worker), self._frame(worker, step, engine)), now)

    def ticked(self, engines: Sequence[Engine], now: float) -> Iterable[Order]:
        """See `Dispatcher`."""
        return self._post(events.Tick(), now)

    def _post(self, event: events.Event, now: float) -> list[Order]:
        return [order for command in self.core.handle(event, now) for order in self._orders(command)]

    def _orders(self, command: commands.Command) -> Iterator[Order]:
        if isinstance(command, commands.StartAttempt):
            request = command.request
            index = sum(len(resume.token_ids) for resume in command.resume)
            self._outputs[request.request_id] = request_pb2.Output(
                request_id=request.request_id, epoch=command.epoch, index=index, token_ids=[1]
            )
            yield Start(int(command.worker_id), request.request_id, _PRIORITY.get(request.priority, 1))
        elif isinstance(command, commands.SendFailure):
            yield Reject(command.failure.request_id)
        elif isinstance(command, commands.Order) and command.command.WhichOneof("order") == "cancel":
            yield Stop(int(command.worker_id), command.command.cancel.request_id)

    def _frame(self, worker: int, step: Step, engine: Engine) -> work_pb2.WorkFrame:
        number = next(self._frames[worker])
        frame = work_pb2.WorkFrame(sequence=number, step=number, busy=len(engine) > 0)
        ended = {job.id for job in step.finished}
        first = {job.id: job.cached for job in step.first}
        for job in itertools.chain(step.first, step.decoded):
            output = self._outputs.get(job.id)
            if output is None:
                continue
            output.cached_tokens = first.get(job.id, 0)
            if job.id in ended:
                output.finish_reason = inference_pb2.FINISH_REASON_STOP
                del self._outputs[job.id]
            frame.outputs.append(output)
            output.index += 1
        if engine.manager.free != self._free[worker]:
            self._free[worker] = engine.manager.free
            frame.models.append(_node_model(engine))
        if step.stored or step.removed:
            change = work_pb2.CacheChange(model=MODEL, number=next(self._changes[worker]))
            change.stored.extend(step.stored)
            change.removed.extend(step.removed)
            frame.cache.append(change)
        return frame


def _record(worker_id: str) -> registry_pb2.WorkerRecord:
    device = fleet_pb2.Device(id="cpu", kind=fleet_pb2.DEVICE_KIND_CPU, memory_bytes=16 * _GIB)
    model = requests_pb2.CatalogueModel(name=MODEL, version=VERSION, context_length=_CONTEXT)
    return registry_pb2.WorkerRecord(
        worker_id=worker_id,
        address=f"{worker_id}:1",
        backend="torch",
        capacity=fleet_pb2.Capacity(devices=[device]),
        models=[registry_pb2.ModelRecord(model=model, weight_bytes=_GIB)],
    )


def _node_model(engine: Engine) -> fleet_pb2.NodeModel:
    return fleet_pb2.NodeModel(
        name=MODEL,
        version=VERSION,
        state=fleet_pb2.MODEL_STATE_LOADED,
        total_blocks=engine.manager.total,
        free_blocks=engine.manager.free,
    )


def _message(request: Request) -> request_pb2.Request:
    interactive, standard = request_pb2.PRIORITY_CLASS_INTERACTIVE, request_pb2.PRIORITY_CLASS_STANDARD
    return request_pb2.Request(
        request_id=request.id,
        tenant=request.tenant,
        model=MODEL,
        token_ids=range(request.prompt),
        prefix_hashes=request.hashes,
        max_tokens=request.max_tokens,
        choices=1,
        priority=interactive if request.interactive else standard,
    )
