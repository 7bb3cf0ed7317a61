"""A gateway and a worker that follow the contract to the letter and assert that the scheduler does. No I/O.

The unit tests' arena drives them directly, `tests/fakes/gateway.py` and `tests/fakes/worker.py` over real gRPC.
"""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass, field

from llmos.internal.v1 import registry_pb2, request_pb2, requests_pb2, work_pb2
from llmos.v1 import fleet_pb2, inference_pb2
from scheduler.requests import blocks_needed

MODEL = "m"
VERSION = "v1"
GIB = 2**30


def token(request_id: str, choice: int, index: int) -> int:
    """What every worker produces at that place."""
    return zlib.crc32(f"{request_id}/{choice}/{index}".encode()) % 50_000


def make_request(request_id: str, prompt: int = 10, max_tokens: int = 8, **fields: object) -> request_pb2.Request:
    """A valid request for `MODEL`."""
    request = request_pb2.Request(request_id=request_id, tenant="t", model=MODEL, max_tokens=max_tokens, choices=1)
    request.token_ids.extend(range(prompt))
    for name, value in fields.items():
        if isinstance(value, list):
            getattr(request, name).extend(value)
        else:
            setattr(request, name, value)
    return request


def make_record(
    worker_id: str,
    *,
    memory: int = 16 * GIB,
    weights: int = 1 * GIB,
    context: int = 1024,
    models: tuple[str, ...] = (MODEL,),
    adapters: tuple[str, ...] = (),
) -> registry_pb2.WorkerRecord:
    """A worker with one processor and the given models."""
    return registry_pb2.WorkerRecord(
        worker_id=worker_id,
        address=f"{worker_id}:1",
        backend="echo",
        capacity=fleet_pb2.Capacity(
            devices=[fleet_pb2.Device(id="cpu", kind=fleet_pb2.DEVICE_KIND_CPU, memory_bytes=memory)]
        ),
        models=[
            registry_pb2.ModelRecord(
                model=requests_pb2.CatalogueModel(name=name, version=VERSION, context_length=context),
                weight_bytes=weights,
            )
            for name in models
        ]
        + [registry_pb2.ModelRecord(model=_adapter(name, context), weight_bytes=GIB // 16) for name in adapters],
    )


def _adapter(name: str, context: int) -> requests_pb2.CatalogueModel:
    return requests_pb2.CatalogueModel(name=name, version=VERSION, context_length=context, base_model=MODEL)


def _epoch(epoch: request_pb2.Epoch) -> tuple[int, int]:
    return (epoch.term, epoch.attempt)


@dataclass
class Running:
    """An attempt on a simulated worker."""

    epoch: tuple[int, int]
    request: request_pb2.Request
    positions: list[int]
    done: list[bool]
    blocks: int


@dataclass
class SimWorker:
    """Holds the whole demand of an attempt from admission on; says what is free in every frame."""

    id: str
    blocks: int
    running: dict[str, Running] = field(default_factory=dict)
    loaded: bool = True
    draining: bool = False
    numerics: str = "n"
    adapters: dict[str, bool] = field(default_factory=dict)
    """Adapters to `MODEL`, and whether they are loaded."""
    highest_term: int = 0
    inbox: deque[object] = field(default_factory=deque)
    sequence: int = 0
    refused: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Highest epoch per request that ended or was cancelled."""
    fail_next: list[str] = field(default_factory=list)
    """Error codes with which the next dispatches are answered."""
    failures: list[request_pb2.Failure] = field(default_factory=list)
    skip_next: bool = False
    """Break the contract once: leave a gap of one token."""
    stall_after: int | None = None
    """Sequences get no token from this index on, while the engine steps."""
    steps: int = 0
    """The engine's counter."""
    poison: int | None = None
    """A prompt with this token kills the engine at the step after its third token; a fresh one takes over at once."""
    deaths: int = 0
    hung: bool = False
    """The engine makes no step; the worker goes on to send frames."""

    @property
    def free(self) -> int:
        free = self.blocks - sum(running.blocks for running in self.running.values())
        assert free >= 0, f"{self.id} was sent more than it can hold"
        return free

    def node_model(self) -> fleet_pb2.NodeModel:
        state = fleet_pb2.MODEL_STATE_LOADED if self.loaded else fleet_pb2.MODEL_STATE_AVAILABLE
        blocks = self.blocks if self.loaded else 0
        return fleet_pb2.NodeModel(
            name=MODEL, version=VERSION, state=state, total_blocks=blocks, free_blocks=self.free if self.loaded else 0
        )

    def node_models(self) -> list[fleet_pb2.NodeModel]:
        """The model, and the adapters to it."""
        states = {True: fleet_pb2.MODEL_STATE_LOADED, False: fleet_pb2.MODEL_STATE_AVAILABLE}
        adapters = (fleet_pb2.NodeModel(name=n, version=VERSION, state=states[on]) for n, on in self.adapters.items())
        return [self.node_model(), *adapters]

    def report(self) -> work_pb2.WorkerReport:
        running = [
            work_pb2.RunningAttempt(request_id=id_, epoch=request_pb2.Epoch(term=r.epoch[0], attempt=r.epoch[1]))
            for id_, r in self.running.items()
        ]
        return work_pb2.WorkerReport(
            worker_id=self.id,
            running=running,
            models=self.node_models(),
            numerics_fingerprint=self.numerics,
            draining=self.draining,
        )

    def obey(self, command: object) -> None:
        if isinstance(command, work_pb2.Dispatch):
            self._dispatch(command)
            return
        assert isinstance(command, work_pb2.Command)
        kind = command.WhichOneof("order")
        if kind == "cancel":
            epoch = (command.cancel.epoch.term, command.cancel.epoch.attempt)
            running = self.running.get(command.cancel.request_id)
            self.refused[command.cancel.request_id] = max(self.refused.get(command.cancel.request_id, (0, 0)), epoch)
            if running is not None and running.epoch <= epoch:
                del self.running[command.cancel.request_id]
        elif kind == "finish":
            running = self.running.get(command.finish.request_id)
            if running is not None and running.positions[command.finish.choice] >= command.finish.keep_until:
                running.done[command.finish.choice] = True
                if all(running.done):
                    self._over(command.finish.request_id)
        elif kind == "load" and command.load.model in self.adapters:
            assert self.loaded, "an adapter before its base"
            self.adapters[command.load.model] = True
        elif kind == "load":
            self.loaded = True
        elif kind == "drain":
            self.draining = not command.drain.undo
        elif kind == "set_priority":
            running = self.running.get(command.set_priority.request_id)
            if running is not None and running.epoch == _epoch(command.set_priority.epoch):
                running.request.priority = int(command.set_priority.priority)  # type: ignore[assignment]
        elif kind == "unload":
            users = [running.request.adapter for running in self.running.values()]
            assert command.unload.model not in users, "an adapter was dropped while it was used"
            self.adapters[command.unload.model] = False

    def _over(self, request_id: str) -> None:
        """An attempt has ended; its epoch is never computed again."""
        self.refused[request_id] = self.running.pop(request_id).epoch

    def _dispatch(self, order: work_pb2.Dispatch) -> None:
        request, epoch = order.request, (order.epoch.term, order.epoch.attempt)
        if epoch <= self.refused.get(request.request_id, (0, 0)):
            return
        earlier = self.running.get(request.request_id)
        if earlier is not None and earlier.epoch >= epoch:
            return
        if self.fail_next or (self.draining and earlier is None):
            code = self.fail_next.pop(0) if self.fail_next else "attempt_lost"
            self.running.pop(request.request_id, None)
            self.failures.append(
                request_pb2.Failure(request_id=request.request_id, epoch=order.epoch, code=code, message="scripted")
            )
            return
        positions, done = [0] * request.choices, [False] * request.choices
        for resume in request.resume:
            for index, value in enumerate(resume.token_ids):
                assert value == token(request.request_id, resume.choice, index)
            positions[resume.choice], done[resume.choice] = len(resume.token_ids), resume.finished
        assert not all(done)
        if request.adapter:
            assert (request.model, request.adapter_version) == (MODEL, VERSION)
            assert self.adapters[request.adapter], "an adapter was not loaded"
        self.running[request.request_id] = Running(
            epoch, request, positions, done, blocks_needed(request, done.count(False))
        )
        assert self.free >= 0

    def step(self) -> work_pb2.WorkFrame:
        """One token for every sequence."""
        self.sequence += 1
        self.steps += not self.hung
        frame = work_pb2.WorkFrame(
            sequence=self.sequence, step=self.steps, busy=bool(self.running) or self.hung, draining=self.draining
        )
        if self._dies():
            self._end_engine()
        for id_, running in list(self.running.items()):
            for choice in range(running.request.choices):
                if not running.done[choice] and not self._stands(running.positions[choice]):
                    frame.outputs.append(self._token(id_, running, choice))
            if all(running.done):
                self._over(id_)
        frame.failures.extend(self.failures)
        self.failures.clear()
        frame.models.extend(self.node_models())
        return frame

    def _dies(self) -> bool:
        """The poison is past its third token, here or on an earlier worker."""
        return any(self.poison in one.request.token_ids and one.positions[0] > 2 for one in self.running.values())

    def _end_engine(self) -> None:
        self.deaths += 1
        for id_, running in list(self.running.items()):
            epoch = request_pb2.Epoch(term=running.epoch[0], attempt=running.epoch[1])
            failure = request_pb2.Failure(request_id=id_, epoch=epoch, code="engine_lost", message="aborted")
            self.failures.append(failure)
            self._over(id_)

    def _stands(self, position: int) -> bool:
        return self.hung or (self.stall_after is not None and position >= self.stall_after)

    def _token(self, id_: str, running: Running, choice: int) -> request_pb2.Output:
        if self.skip_next and running.positions[choice] + 1 < running.request.max_tokens:
            self.skip_next = False
            running.positions[choice] += 1
        index = running.positions[choice]
        running.positions[choice] = index + 1
        output = request_pb2.Output(
            request_id=id_,
            epoch=request_pb2.Epoch(term=running.epoch[0], attempt=running.epoch[1]),
            choice=choice,
            index=index,
            token_ids=[token(id_, choice, index)],
        )
        if index + 1 >= running.request.max_tokens:
            running.done[choice] = True
            output.finish_reason = inference_pb2.FINISH_REASON_LENGTH
        return output


FromScheduler = request_pb2.Output | request_pb2.Failure | requests_pb2.ClassChange


@dataclass
class Client:
    """A request as its gateway knows it."""

    request: request_pb2.Request
    tokens: list[list[int]]
    finished: list[bool]
    epoch: tuple[int, int] = (0, 0)
    error: str = ""
    cancelled: bool = False

    @property
    def open(self) -> bool:
        return not self.error and not self.cancelled and not (self.finished and all(self.finished))


@dataclass
class SimGateway:
    """Takes the next index only and asserts that nothing else comes on a stream."""

    id: str
    stream_id: int = 0
    inbox: deque[FromScheduler] = field(default_factory=deque)
    clients: dict[str, Client] = field(default_factory=dict)
    catalogue: requests_pb2.Catalogue | None = None

    def take(self, message: FromScheduler) -> None:
        client = self.clients[message.request_id]
        if client.cancelled:
            return
        if isinstance(message, requests_pb2.ClassChange):
            moved = request_pb2.Request()
            moved.CopyFrom(client.request)  # the scheduler under test may hold the message that was submitted
            moved.priority = message.priority
            client.request = moved
            return
        assert not client.error, "output or a second end after a failure"
        if isinstance(message, request_pb2.Failure):
            assert client.open, "a failure after the end"
            client.error = message.code
            return
        epoch = (message.epoch.term, message.epoch.attempt)
        assert epoch >= client.epoch, "an epoch went backwards"
        client.epoch = epoch
        have = client.tokens[message.choice]
        if client.finished[message.choice] and not message.token_ids:
            return
        assert not client.finished[message.choice], "output for a choice that had ended"
        assert message.index == len(have), f"index {message.index}, expected {len(have)}"
        for offset, value in enumerate(message.token_ids):
            assert value == token(message.request_id, message.choice, message.index + offset)
        have.extend(message.token_ids)
        client.finished[message.choice] = bool(message.finish_reason)

    def unfinished(self) -> list[request_pb2.Request]:
        """What to submit after a reconnect."""
        again = []
        for client in self.clients.values():
            if client.open:
                request = request_pb2.Request()
                request.CopyFrom(client.request)
                for choice, tokens in enumerate(client.tokens):
                    if tokens or client.finished[choice]:
                        request.resume.add(choice=choice, token_ids=tokens, finished=client.finished[choice])
                again.append(request)
        return again
