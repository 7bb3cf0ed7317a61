"""A worker's core without processes: a scripted engine, a scripted stream, a clock moved by hand."""

from __future__ import annotations

from collections.abc import Iterable

from llmos.errors import LlmosError, Unavailable
from llmos.internal.v1 import request_pb2, work_pb2
from llmos.telemetry import Telemetry
from llmos.v1 import fleet_pb2, inference_pb2
from tests.fakes.clock import ManualClock
from worker.core import WorkerCore
from worker.models import echo_model
from worker.shelf import Shelf
from worker.spans import ExecuteSpans

LOADED, LOADING = fleet_pb2.MODEL_STATE_LOADED, fleet_pb2.MODEL_STATE_LOADING
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class FakeEngine:
    """Remembers commands."""

    def __init__(self) -> None:
        self.orders: list[str] = []
        self.last: work_pb2.Command = work_pb2.Command()
        self.refuses = False

    def send(self, commands: Iterable[work_pb2.Command]) -> None:
        if self.refuses:
            raise Unavailable("Not now.")
        for command in commands:
            self.orders.append(str(command.WhichOneof("order")))
            self.last = command


class FakeStream:
    """Remembers what it was told."""

    def __init__(self, term: int = 1) -> None:
        self.term = term
        self.wakes = 0
        self.error: LlmosError | None = None

    def wake(self) -> None:
        self.wakes += 1

    def replace(self, error: LlmosError) -> None:
        self.error = error


class Rig:
    """A core with a loaded model and an attached scheduler."""

    def __init__(self, *, attach: bool = True) -> None:
        self.clock = ManualClock()
        self.telemetry = Telemetry("worker", "w1", clock=self.clock)
        capacity = fleet_pb2.Capacity(devices=[fleet_pb2.Device(id="cpu", memory_bytes=2**30)])
        self.shelf = Shelf([echo_model("echo"), echo_model("vast=40GiB")], capacity)
        self.core = WorkerCore("w1", self.shelf, ExecuteSpans(self.telemetry), self.clock)
        self.engine = FakeEngine()
        self.core.connect(self.engine)
        self.stream = FakeStream()
        if attach:
            self.ready()
            self.core.attach(batch(hello()), self.stream)
            self.send(load())
            self.loaded()
            self.core.next_frame()

    def ready(self) -> None:
        self.core.engine_ready(work_pb2.WorkerReport(numerics_fingerprint="f"))

    def loaded(self) -> None:
        model = fleet_pb2.NodeModel(name="echo", version="x", state=LOADED, total_blocks=10, free_blocks=10)
        self.core.engine_frame(work_pb2.WorkFrame(models=[model]))

    def send(self, *commands: work_pb2.Command, term: int = 1, acknowledged: int = 0) -> None:
        self.core.receive(batch(*commands, term=term, acknowledged=acknowledged), self.stream)

    def output(self, index: int, *, attempt: int = 1, end: bool = False, request_id: str = "a") -> None:
        self.core.engine_frame(
            work_pb2.WorkFrame(
                step=index + 1, busy=not end, outputs=[piece(index, attempt=attempt, end=end, request_id=request_id)]
            )
        )

    def running(self) -> list[tuple[str, int]]:
        report = self.core.attach(batch(hello(), term=9), FakeStream(9))
        return [(entry.request_id, entry.epoch.attempt) for entry in report.running]


def batch(*commands: work_pb2.Command, term: int = 1, acknowledged: int = 0) -> work_pb2.AttachRequest:
    return work_pb2.AttachRequest(term=term, commands=commands, acknowledged=acknowledged)


def hello() -> work_pb2.Command:
    return work_pb2.Command(hello=work_pb2.SchedulerHello(scheduler_id="s"))


def load(model: str = "echo") -> work_pb2.Command:
    return work_pb2.Command(load=work_pb2.LoadModel(model=model))


def dispatch(request_id: str = "a", attempt: int = 1, model: str = "echo", choices: int = 1) -> work_pb2.Command:
    request = request_pb2.Request(request_id=request_id, model=model, choices=choices, max_tokens=10)
    epoch = request_pb2.Epoch(term=1, attempt=attempt)
    trace = request_pb2.TraceContext(traceparent=PARENT)
    return work_pb2.Command(dispatch=work_pb2.Dispatch(epoch=epoch, request=request, trace=trace))


def cancel(request_id: str = "a", attempt: int = 1) -> work_pb2.Command:
    epoch = request_pb2.Epoch(term=1, attempt=attempt)
    return work_pb2.Command(cancel=work_pb2.CancelAttempt(request_id=request_id, epoch=epoch))


def piece(index: int, *, attempt: int = 1, end: bool = False, request_id: str = "a") -> request_pb2.Output:
    reason = inference_pb2.FINISH_REASON_STOP if end else inference_pb2.FINISH_REASON_UNSPECIFIED
    epoch = request_pb2.Epoch(term=1, attempt=attempt)
    return request_pb2.Output(request_id=request_id, epoch=epoch, index=index, token_ids=[65], finish_reason=reason)
