"""The engine process: one thread that owns the backend, driven over an inherited socket.

`python -m worker.engine_process FD PARENT_PID`. The first message that comes in is the setup (JSON), the later ones are
`AttachRequest` batches of commands; out go `AttachResponse` messages: a report once the backend exists, then one frame
per step. It dies with its parent: by PR_SET_PDEATHSIG on Linux, by the end of the socket everywhere.
"""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from llmos.clock import Clock, SystemClock
from llmos.errors import LlmosError, ModelNotFound, SetupError
from llmos.internal.v1 import request_pb2, work_pb2
from llmos.store.precision import Precision, PrecisionPlan
from llmos.v1 import fleet_pb2
from worker import backends, pipe, wire
from worker.adapter_spec import adapter_spec
from worker.backend import Backend, Blocks, Failure, Footprint, ModelSpec, StepResult

log = logging.getLogger(__name__)

EXIT_SETUP = 3
"""The backend cannot exist here; starting again would not help."""
_PR_SET_PDEATHSIG = 1
_BACKLOG = 4096


class EngineModel(msgspec.Struct, frozen=True, kw_only=True):
    """`ModelSpec` as it travels."""

    name: str
    version: str
    folder: str = ""
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    context_length: int = 0
    base: str = ""
    plan: PrecisionPlan | None = None

    def spec(self) -> ModelSpec:
        """For the backend."""
        return ModelSpec(
            self.name,
            self.version,
            Path(self.folder) if self.folder else None,
            self.weight_bytes,
            self.kv_bytes_per_token,
            self.context_length,
            self.base,
            self.plan,
        )


class EngineSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine process must know before its first command."""

    backend: str
    threads: int
    tokens_per_second: float
    load_s: float = 0.0
    leak_bytes: int = 0
    models: tuple[EngineModel, ...]
    log_level: str = "info"
    precision: Precision = "auto"
    gpu: str = ""
    """UUID of the graphics processor that the torch backend computes on; empty: the CPU."""
    store: str = ""
    """Folder of the model store; empty: the user's."""


class _Loaded(msgspec.Struct, frozen=True):
    """A model that is loaded, and what that took."""

    spec: ModelSpec
    taken: Footprint
    load_ms: int


class Transmit:
    """Sends messages to the RPC process, blocking; that process reads as fast as it can."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def __call__(self, message: work_pb2.AttachResponse) -> None:
        pipe.write(self._sock, message.SerializeToString())


class Engine:
    """Runs a backend: commands between steps, one frame per step. Everything happens in the calling thread."""

    def __init__(
        self,
        backend: Backend,
        models: Mapping[str, ModelSpec],
        send: Transmit,
        store: Path | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._backend = backend
        self._models = models
        self._store = store
        self._send = send
        self._steps = 0
        self._loaded: dict[str, _Loaded] = {}
        self._shown: dict[str, Blocks] = {}
        self._failures: list[request_pb2.Failure] = []
        self._states: list[fleet_pb2.NodeModel] = []

    @property
    def busy(self) -> bool:
        """Whether a step has anything to compute."""
        return self._backend.busy()

    def obey(self, commands: Iterable[work_pb2.Command]) -> None:
        """Carry out commands in order. What goes wrong with one is reported in the next frame."""
        for command in commands:
            match command.WhichOneof("order"):
                case "dispatch":
                    self._admit(command.dispatch)
                case "cancel":
                    self._backend.cancel(command.cancel.request_id)
                case "finish":
                    finish = command.finish
                    self._backend.cancel(finish.request_id, finish.choice, finish.keep_until)
                case "set_priority":
                    change = command.set_priority
                    self._backend.set_priority(change.request_id, wire.priority_from_wire(change.priority))
                case "load":
                    self._load(command.load)
                case "unload":
                    self._unload(command.unload.model)

    def step(self) -> None:
        """Advance the batch if there is one, and send what came of it."""
        result = StepResult()
        if self._backend.busy():
            result = self._backend.step()
            self._steps += 1
        self._send(work_pb2.AttachResponse(frame=self._frame(result)))

    def _admit(self, dispatch: work_pb2.Dispatch) -> None:
        attempt = wire.attempt_from_wire(dispatch)
        try:
            self._backend.admit(attempt)
        except LlmosError as error:
            failure = Failure(attempt.request_id, attempt.epoch, error.code, error.message, error.param or "")
            self._failures.append(wire.failure_to_wire(failure))

    def _unload(self, name: str) -> None:
        """Say so only when its memory is free: until then nothing else may be loaded in its place."""
        self._backend.unload(name)
        self._loaded.pop(name, None)
        self._states.append(fleet_pb2.NodeModel(name=name, state=fleet_pb2.MODEL_STATE_AVAILABLE))

    def _load(self, order: work_pb2.LoadModel) -> None:
        began = self._clock.monotonic()
        try:
            spec = self._models.get(order.model) or adapter_spec(self._store, self._models.values(), order)
            if spec is None or order.version not in ("", spec.version):
                raise ModelNotFound(f"This worker does not hold {order.model} {order.version}.")
            self._backend.load(spec, order.memory_budget_bytes)
        except LlmosError as error:
            self._failed(order, error.message)
        except Exception as error:
            # Whatever a model's files or an allocator raise, the engine and its other models go on.
            log.exception("loading %s failed", order.model)
            self._failed(order, f"Loading failed: {type(error).__name__}.")
        else:
            load_ms = max(1, round(1000 * (self._clock.monotonic() - began)))
            self._loaded[order.model] = _Loaded(spec, self._backend.footprint(order.model), load_ms)
            self._shown.pop(order.model, None)

    def _failed(self, order: work_pb2.LoadModel, detail: str) -> None:
        state = fleet_pb2.MODEL_STATE_FAILED
        self._states.append(
            fleet_pb2.NodeModel(name=order.model, version=order.version, state=state, detail=detail[:500])
        )

    def _frame(self, result: StepResult) -> work_pb2.WorkFrame:
        frame = work_pb2.WorkFrame(
            step=self._steps,
            busy=self._backend.busy(),
            failures=[*self._failures, *map(wire.failure_to_wire, result.failures)],
            spans=map(wire.stage_to_wire, result.stages),
            models=[*self._states, *self._changed_blocks()],
            cache=map(wire.cache_to_wire, result.cache),
        )
        for output in result.outputs:
            wire.add_output(frame, output)
        self._failures.clear()
        self._states.clear()
        return frame

    def _changed_blocks(self) -> Iterable[fleet_pb2.NodeModel]:
        for name, blocks in self._backend.blocks().items():
            if name in self._loaded and self._shown.get(name) != blocks:
                self._shown[name] = blocks
                loaded = self._loaded[name]
                yield wire.loaded_to_wire(loaded.spec, blocks, loaded.taken, loaded.load_ms)


class CommandReader(threading.Thread):
    """Reads commands so that the sender never waits for a step. Ends the process when the socket ends."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(name="commands", daemon=True)
        self._stream = sock.makefile("rb")
        self._batches: queue.Queue[work_pb2.AttachRequest] = queue.Queue(_BACKLOG)

    def setup(self) -> EngineSetup:
        """The first message; before `start`."""
        message = pipe.read(self._stream)
        if message is None:
            os._exit(0)
        return msgspec.json.decode(message, type=EngineSetup)

    def run(self) -> None:
        """See `threading.Thread`."""
        while (message := pipe.read(self._stream)) is not None:
            self._batches.put(work_pb2.AttachRequest.FromString(message))
        # Not sys.exit: a step or a load may hold the main thread for long, and nobody wants its result any more.
        os._exit(0)

    def take(self, wait: bool) -> list[work_pb2.Command]:
        """Commands that have arrived; with `wait`, at least one batch."""
        commands: list[work_pb2.Command] = []
        try:
            if wait:
                commands.extend(self._batches.get().commands)
            while True:
                commands.extend(self._batches.get_nowait().commands)
        except queue.Empty:
            return commands


def die_with(parent: int) -> None:
    """End with the parent process, even if that is killed. Ends at once if the parent is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def serve(sock: socket.socket) -> int:
    """Run an engine on the socket until the other end is gone. Returns the exit status."""
    reader = CommandReader(sock)
    setup = reader.setup()
    logging.basicConfig(level=setup.log_level.upper(), format="%(asctime)s %(levelname)s engine %(message)s")
    try:
        backend, fingerprint = backends.create(
            setup.backend,
            threads=setup.threads,
            tokens_per_second=setup.tokens_per_second,
            load_s=setup.load_s,
            leak_bytes=setup.leak_bytes,
            precision=setup.precision,
            gpu=setup.gpu,
        )
    except SetupError as error:
        log.error("%s", error.message)
        return EXIT_SETUP
    send = Transmit(sock)
    models = {model.name: model.spec() for model in setup.models}
    engine = Engine(backend, models, send, Path(setup.store) if setup.store else None)
    reader.start()
    try:
        send(work_pb2.AttachResponse(report=work_pb2.WorkerReport(numerics_fingerprint=fingerprint)))
        while True:
            engine.obey(reader.take(wait=not engine.busy))
            engine.step()
    except (BrokenPipeError, ConnectionResetError):
        return 0


def main(argv: list[str]) -> int:
    """Entry point of the process."""
    # The terminal and service managers signal the whole group; this process ends when its parent lets go of the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with(int(argv[2]))
    return serve(socket.socket(fileno=int(argv[1])))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
