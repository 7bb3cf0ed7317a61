"""What a worker decides about schedulers and their streams, without processes."""

from __future__ import annotations

import pytest

from llmos.errors import AttemptLost, FleetError, InvalidRequest, LlmosError, StaleTerm, Unavailable
from llmos.internal.v1 import request_pb2, work_pb2
from tests.unit.worker.rig import FakeStream, Rig, batch, cancel, dispatch, hello


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


def test_who_means_another_worker_is_refused_and_the_stream_that_is_lives_on() -> None:
    rig = Rig()
    meant = work_pb2.Command(hello=work_pb2.SchedulerHello(scheduler_id="s", worker_id="w0"))
    with pytest.raises(AttemptLost, match="Another worker"):
        rig.core.attach(batch(meant), FakeStream())
    assert rig.stream.error is None
    rig.send(dispatch())
    assert rig.engine.orders == ["load", "dispatch"]


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


def test_what_waits_for_a_stream_does_not_wait_for_its_heartbeat() -> None:
    rig = Rig()
    rig.send(dispatch())
    rig.core.detach(rig.stream)
    rig.output(0)
    fresh = FakeStream()
    rig.core.attach(batch(hello()), fresh)
    assert fresh.wakes == 1
    assert [output.index for output in rig.core.next_frame().outputs] == [0]
    assert fresh.wakes == 1, "nothing is left"


def test_what_one_frame_cannot_hold_goes_with_the_next_at_once() -> None:
    rig = Rig()
    rig.send(dispatch(choices=2))
    rig.core.detach(rig.stream)
    long = [2**31] * (1024 * 1024)  # five bytes each on the wire
    for choice in (0, 1):
        epoch = request_pb2.Epoch(term=1, attempt=1)
        vast = request_pb2.Output(request_id="a", epoch=epoch, choice=choice, token_ids=long)
        rig.core.engine_frame(work_pb2.WorkFrame(outputs=[vast]))
    fresh = FakeStream()
    rig.core.attach(batch(hello()), fresh)
    assert [output.choice for output in rig.core.next_frame().outputs] == [0]
    assert fresh.wakes == 2
    assert [output.choice for output in rig.core.next_frame().outputs] == [1]
    assert fresh.wakes == 2


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


def test_a_worker_that_leaves_is_not_taken_back() -> None:
    rig = Rig()
    undo = work_pb2.Command(drain=work_pb2.Drain(undo=True))
    rig.send(work_pb2.Command(drain=work_pb2.Drain()))
    rig.core.drain()
    rig.send(undo, dispatch("a"))
    assert rig.core.draining
    assert rig.core.next_frame().draining
    assert "dispatch" not in rig.engine.orders


def test_a_worker_that_was_emptied_by_order_is_taken_back() -> None:
    rig = Rig()
    rig.send(work_pb2.Command(drain=work_pb2.Drain()))
    assert rig.core.next_frame().draining
    rig.send(work_pb2.Command(drain=work_pb2.Drain(undo=True)), dispatch("a"))
    assert not rig.core.next_frame().draining
    assert rig.engine.orders[-1] == "dispatch"
