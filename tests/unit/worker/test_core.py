"""What a worker decides, without processes."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from llmos.errors import FleetError, InvalidRequest, LlmosError, StaleTerm, Unavailable
from llmos.internal.v1 import request_pb2, requests_pb2, work_pb2
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


def test_output_flows_and_the_attempt_ends() -> None:
    rig = Rig()
    rig.send(dispatch())
    rig.output(0)
    rig.output(1, end=True)
    frame = rig.core.next_frame()
    assert [(output.index, list(output.token_ids)) for output in frame.outputs] == [(0, [65, 65])]
    assert (frame.step, frame.busy) == (2, False)
    assert [span.name for span in frame.spans] == ["execute"]
    assert not rig.core.idle
    rig.send(acknowledged=frame.sequence)
    assert rig.core.idle


def test_nothing_to_say_wakes_nobody() -> None:
    rig = Rig()
    wakes = rig.stream.wakes
    rig.core.engine_frame(work_pb2.WorkFrame(step=5, busy=True))
    rig.send(acknowledged=1)
    assert rig.stream.wakes == wakes
    assert rig.core.next_frame().step == 5


def test_duplicates_reach_the_engine_once() -> None:
    rig = Rig()
    rig.send(dispatch(), dispatch())
    rig.send(dispatch())
    assert rig.engine.orders == ["load", "dispatch"]
    assert rig.core.counts["duplicate"] == 2


def test_a_replaced_attempt_says_nothing_more() -> None:
    rig = Rig()
    rig.send(dispatch())
    rig.output(0)
    rig.send(dispatch(attempt=2))
    rig.output(1)
    rig.output(0, attempt=2)
    frame = rig.core.next_frame()
    assert [output.epoch.attempt for output in frame.outputs] == [2]
    assert rig.core.counts["late"] == 1


def test_cancel_drops_what_was_not_sent_and_closes_the_span() -> None:
    rig = Rig()
    rig.send(dispatch())
    rig.output(0)
    rig.send(cancel())
    rig.output(1)
    frame = rig.core.next_frame()
    assert list(frame.outputs) == []
    assert [(span.name, span.error) for span in frame.spans] == [("execute", "cancelled")]
    assert rig.engine.orders[-1] == "cancel"
    rig.send(cancel())
    assert rig.engine.orders.count("cancel") == 1


def test_refusals_are_failures_of_that_attempt_alone() -> None:
    rig = Rig()
    rig.send(dispatch("x", model="other"), dispatch("y", model="vast"), dispatch("z"))
    frame = rig.core.next_frame()
    assert {(failure.request_id, failure.code) for failure in frame.failures} == {
        ("x", "unavailable"),
        ("y", "unavailable"),
    }
    assert rig.running() == [("z", 1)]


def test_an_engine_that_takes_nothing_fails_the_dispatch() -> None:
    rig = Rig()
    rig.engine.refuses = True
    rig.send(dispatch())
    assert [failure.code for failure in rig.core.next_frame().failures] == ["attempt_lost"]
    assert rig.running() == []


def test_a_gap_in_the_engines_output_fails_the_attempt() -> None:
    rig = Rig()
    rig.send(dispatch())
    rig.output(0)
    rig.output(2)
    frame = rig.core.next_frame()
    assert [output.index for output in frame.outputs] == [0]
    assert [failure.code for failure in frame.failures] == ["attempt_lost"]
    assert rig.engine.orders[-1] == "cancel"


def test_the_engines_own_failure_is_passed_on_once() -> None:
    rig = Rig()
    rig.send(dispatch())
    failure = request_pb2.Failure(request_id="a", epoch=request_pb2.Epoch(term=1, attempt=1), code="invalid_request")
    rig.core.engine_frame(work_pb2.WorkFrame(failures=[failure, failure]))
    assert [failure.code for failure in rig.core.next_frame().failures] == ["invalid_request"]


def test_a_lost_engine_loses_attempts_but_not_orders() -> None:
    rig = Rig()
    rig.send(dispatch("a"), dispatch("b"))
    rig.output(0)
    rig.core.engine_lost("signal 9")
    frame = rig.core.next_frame()
    assert [output.request_id for output in frame.outputs] == ["a"]
    assert {failure.request_id for failure in frame.failures} == {"a", "b"}
    assert {failure.code for failure in frame.failures} == {"attempt_lost"}
    assert [(model.name, model.state, model.free_blocks) for model in frame.models] == [("echo", LOADING, 0)]
    rig.send(dispatch("c"))
    assert [failure.code for failure in rig.core.next_frame().failures] == ["attempt_lost"]
    rig.ready()
    assert rig.engine.orders[-1] == "load"
    rig.loaded()
    rig.send(dispatch("c", attempt=2))
    rig.core.engine_frame(work_pb2.WorkFrame(step=1))
    assert rig.core.next_frame().step == 2, "the counter goes on over the restart"


def test_orders_before_the_engine_is_there_are_carried_out_when_it_is() -> None:
    rig = Rig()
    rig.core.engine_lost("status 1")
    rig.send(work_pb2.Command(unload=work_pb2.UnloadModel(model="echo")), load())
    before = rig.engine.orders.count("load")
    rig.ready()
    assert rig.engine.orders.count("load") == before + 1


def test_loading_twice_is_one_load() -> None:
    rig = Rig()
    rig.send(load(), load("nobody"), load("vast"))
    assert rig.engine.orders == ["load"]


def test_a_failed_load_can_be_ordered_again() -> None:
    rig = Rig(attach=False)
    rig.ready()
    rig.core.attach(batch(hello(), load()), rig.stream)
    failed = fleet_pb2.NodeModel(name="echo", state=fleet_pb2.MODEL_STATE_FAILED, detail="no room")
    rig.core.engine_frame(work_pb2.WorkFrame(models=[failed]))
    (model,) = rig.core.next_frame().models
    assert (model.state, model.detail, model.version) == (fleet_pb2.MODEL_STATE_FAILED, "no room", "echo-1")
    rig.send(load())
    assert rig.engine.orders == ["load", "load"]


def test_another_version_is_refused() -> None:
    rig = Rig(attach=False)
    rig.ready()
    order = work_pb2.Command(load=work_pb2.LoadModel(model="echo", version="another"))
    rig.core.attach(batch(hello(), order), rig.stream)
    assert [model.state for model in rig.core.next_frame().models] == [fleet_pb2.MODEL_STATE_FAILED]
    assert rig.engine.orders == []


def test_an_order_without_a_budget_gets_the_largest_device() -> None:
    rig = Rig()
    assert rig.engine.last.load.memory_budget_bytes == 2**30


def test_unload_fails_its_attempts() -> None:
    rig = Rig()
    rig.send(dispatch(), work_pb2.Command(unload=work_pb2.UnloadModel(model="echo")))
    frame = rig.core.next_frame()
    assert [failure.code for failure in frame.failures] == ["attempt_lost"]
    assert [model.state for model in frame.models] == [fleet_pb2.MODEL_STATE_AVAILABLE]


def test_finish_of_the_last_choice_ends_the_attempt() -> None:
    rig = Rig()
    rig.send(dispatch())
    rig.output(0)
    finish = requests_pb2.Finish(request_id="a", choice=0, keep_until=1)
    rig.send(work_pb2.Command(finish=finish))
    assert rig.engine.orders[-1] == "finish"
    frame = rig.core.next_frame()
    assert [(span.name, span.error) for span in frame.spans] == [("execute", "")]
    rig.send(work_pb2.Command(finish=finish), acknowledged=frame.sequence)
    assert rig.core.idle


def test_lower_terms_are_refused_and_change_nothing() -> None:
    rig = Rig()
    assert rig.running() == []
    for refused in (lambda: rig.send(dispatch(), term=8), lambda: rig.core.attach(batch(hello()), FakeStream())):
        with pytest.raises(StaleTerm):
            refused()
    assert rig.core.counts["stale_term"] == 2
    assert rig.engine.orders == ["load"]


def test_batches_of_a_replaced_stream_are_ignored() -> None:
    rig = Rig()
    rig.core.attach(batch(hello()), FakeStream())
    rig.send(dispatch())
    assert rig.engine.orders == ["load"]


@pytest.mark.parametrize(("term", "kind"), [(1, FleetError), (2, StaleTerm)])
def test_a_replaced_leader_learns_whether_its_term_is_over(term: int, kind: type[LlmosError]) -> None:
    rig = Rig()
    rig.core.attach(batch(hello(), term=term), FakeStream(term))
    assert type(rig.stream.error) is kind


def test_a_stream_without_hello_is_refused() -> None:
    rig = Rig()
    for commands in ((), (dispatch(), hello())):
        with pytest.raises(InvalidRequest):
            rig.core.attach(batch(*commands), FakeStream())
    assert rig.stream.error is None


def test_nobody_attaches_before_the_engine_was_ready_once() -> None:
    rig = Rig(attach=False)
    with pytest.raises(Unavailable):
        rig.core.attach(batch(hello()), rig.stream)


def test_the_report_names_what_runs_and_what_was_not_acknowledged() -> None:
    rig = Rig()
    rig.send(dispatch("runs"), dispatch("done"))
    rig.output(0, request_id="done", end=True)
    rig.core.next_frame()
    assert rig.running() == [("done", 1), ("runs", 1)]


def test_a_new_stream_hears_again_what_was_not_acknowledged() -> None:
    rig = Rig()
    rig.send(dispatch("a"), dispatch("b"))
    rig.output(0)
    rig.output(0, request_id="b")
    rig.core.next_frame()
    rig.send(cancel("b"))
    rig.core.detach(rig.stream)
    rig.output(1)
    rig.core.attach(batch(hello()), FakeStream())
    frame = rig.core.next_frame()
    assert frame.sequence == 1
    assert [(output.request_id, output.index, len(output.token_ids)) for output in frame.outputs] == [("a", 0, 2)]


def test_orphans_are_cancelled_only_after_their_time() -> None:
    rig = Rig()
    rig.send(dispatch())
    rig.clock.advance(100)
    rig.core.tick()
    rig.core.detach(rig.stream)
    rig.clock.advance(9.9)
    rig.core.tick()
    assert rig.engine.orders == ["load", "dispatch"]
    rig.clock.advance(0.2)
    rig.core.tick()
    rig.core.tick()
    assert rig.engine.orders == ["load", "dispatch", "cancel"]
    assert rig.running() == []


def test_the_end_of_a_replaced_stream_does_not_orphan() -> None:
    rig = Rig()
    rig.send(dispatch())
    old = rig.stream
    rig.core.attach(batch(hello()), FakeStream())
    rig.core.detach(old)
    rig.clock.advance(100)
    rig.core.tick()
    assert rig.engine.orders == ["load", "dispatch"]


def test_draining_is_announced_once_and_refuses_new_attempts() -> None:
    rig = Rig()
    rig.send(dispatch("a"), work_pb2.Command(drain=work_pb2.Drain()), dispatch("b"))
    assert rig.core.sendable
    frame = rig.core.next_frame()
    assert frame.draining
    assert [(failure.request_id, failure.code) for failure in frame.failures] == [("b", "attempt_lost")]
    rig.send(acknowledged=frame.sequence)
    assert not rig.core.sendable
    assert not rig.core.idle
    rig.output(0, end=True)
    rig.send(acknowledged=rig.core.next_frame().sequence)
    assert rig.core.idle


def test_stages_become_children_of_execute_on_the_wall_clock() -> None:
    rig = Rig()
    rig.send(dispatch())
    begin = rig.clock.monotonic()
    rig.clock.advance(2)
    attributes = {"llmos.request_id": "a", "llmos.term": "1", "llmos.attempt": "1", "llmos.tokens": "7"}
    stage = fleet_pb2.Span(
        name="engine.prefill",
        start_unix_ns=int((begin + 1) * 1e9),
        end_unix_ns=int((begin + 2) * 1e9),
        attributes=attributes,
    )
    rig.core.engine_frame(work_pb2.WorkFrame(spans=[stage], outputs=[piece(0, end=True)]))
    late = fleet_pb2.Span(name="engine.decode", attributes=attributes)
    rig.core.engine_frame(work_pb2.WorkFrame(spans=[late]))
    prefill, execute = rig.core.next_frame().spans
    assert (prefill.name, execute.name) == ("engine.prefill", "execute")
    assert prefill.parent_span_id == execute.span_id
    assert execute.parent_span_id.hex() == PARENT.split("-")[2]
    assert prefill.start_unix_ns - execute.start_unix_ns == 1_000_000_000
    assert prefill.end_unix_ns == execute.end_unix_ns
