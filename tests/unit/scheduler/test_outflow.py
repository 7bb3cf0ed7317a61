"""Frames for a gateway: windowed, folded, bounded, and nothing lost on the way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmos.internal.v1 import request_pb2, requests_pb2
from llmos.v1 import inference_pb2
from scheduler.outflow import Outflow


def piece(request_id: str, index: int, tokens: list[int], *, choice: int = 0, attempt: int = 1) -> request_pb2.Output:
    epoch = request_pb2.Epoch(term=1, attempt=attempt)
    return request_pb2.Output(request_id=request_id, epoch=epoch, choice=choice, index=index, token_ids=tokens)


def test_one_frame_holds_everything_collected() -> None:
    flow = Outflow()
    flow.add(piece("a", 0, [1]))
    flow.add(piece("b", 0, [2]))
    flow.add_failure(request_pb2.Failure(request_id="c", code="cancelled"))
    frame = flow.take()
    assert frame is not None
    assert frame.sequence == 1
    assert [output.request_id for output in frame.outputs] == ["a", "b"]
    assert [failure.request_id for failure in frame.failures] == ["c"]
    assert flow.take() is None


def change(request_id: str, priority: request_pb2.PriorityClass.ValueType) -> requests_pb2.ClassChange:
    return requests_pb2.ClassChange(request_id=request_id, priority=priority)


def test_only_the_last_class_of_a_request_goes_out_and_only_once() -> None:
    flow = Outflow(window=1)
    flow.add(piece("a", 0, [1]))
    flow.take()
    flow.add_class_change(change("a", request_pb2.PRIORITY_CLASS_BATCH))
    flow.add_class_change(change("b", request_pb2.PRIORITY_CLASS_BATCH))
    flow.add_class_change(change("a", request_pb2.PRIORITY_CLASS_INTERACTIVE))
    assert flow.take() is None
    flow.acknowledge(1)
    frame = flow.take()
    assert frame is not None
    assert list(frame.class_changes) == [
        change("a", request_pb2.PRIORITY_CLASS_INTERACTIVE),
        change("b", request_pb2.PRIORITY_CLASS_BATCH),
    ]
    flow.acknowledge(2)
    assert flow.take() is None


def test_window_closes_until_frames_are_acknowledged() -> None:
    flow = Outflow(window=2)
    for index in range(3):
        flow.add(piece("a", index, [index]))
        flow.take()
    assert flow.unacknowledged == 2
    assert flow.take() is None
    flow.acknowledge(1)
    frame = flow.take()
    assert frame is not None
    assert frame.sequence == 3
    flow.acknowledge(99)
    assert flow.unacknowledged == 0


def test_what_waits_is_folded_and_the_original_left_alone() -> None:
    flow = Outflow(window=1)
    flow.add(piece("x", 0, [0]))
    flow.take()
    first = piece("a", 0, [0])
    flow.add(first)
    for index in range(1, 5000):
        flow.add(piece("a", index, [index]))
    flow.acknowledge(1)
    frame = flow.take()
    assert frame is not None
    assert len(frame.outputs) < 1000
    assert [t for output in frame.outputs for t in output.token_ids] == list(range(5000))
    assert list(first.token_ids) == [0]


def test_new_attempts_and_gaps_are_not_folded_together() -> None:
    flow = Outflow(limit_bytes=10)
    flow.add(piece("a", 0, [1]))
    flow.add(piece("a", 1, [2], attempt=2))
    flow.add(piece("a", 5, [3], attempt=2))
    done = piece("a", 6, [4], attempt=2)
    done.finish_reason = inference_pb2.FINISH_REASON_STOP
    flow.add(done)
    frame = flow.take()
    assert frame is not None
    assert [(output.index, list(output.token_ids)) for output in frame.outputs] == [(0, [1]), (1, [2]), (5, [3, 4])]
    assert frame.outputs[2].finish_reason == inference_pb2.FINISH_REASON_STOP


def test_overflow_shows_when_folding_does_not_help() -> None:
    flow = Outflow(window=1, limit_bytes=1000)
    flow.add(piece("x", 0, [0]))
    flow.take()
    for number in range(10):
        flow.add(piece(f"r{number}", 0, [1]))
    assert not flow.overflowing
    for number in range(100):
        flow.add(piece(f"s{number}", 0, [1]))
    assert flow.overflowing


def test_large_backlogs_go_in_several_frames() -> None:
    flow = Outflow(limit_bytes=64 * 2**20)
    for number in range(10):
        flow.add(piece(f"r{number}", 0, [2**31] * 200_000))
    flow.add_failure(request_pb2.Failure(request_id="late"))
    frames = []
    while (frame := flow.take()) is not None:
        frames.append(frame)
    assert len(frames) > 1
    assert all(frame.ByteSize() < 8 * 2**20 for frame in frames)
    assert [len(frame.failures) for frame in frames] == [0] * (len(frames) - 1) + [1]
    assert sum(len(frame.outputs) for frame in frames) == 10


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.booleans()), max_size=200))
def test_every_token_arrives_once_and_in_order(steps: list[tuple[str, int, bool]]) -> None:
    flow = Outflow(window=2, limit_bytes=60)
    sent: dict[tuple[str, int], int] = {}
    got: dict[tuple[str, int], int] = {}

    def read() -> None:
        while (frame := flow.take()) is not None:
            for output in frame.outputs:
                key = (output.request_id, output.choice)
                assert output.index == got.get(key, 0)
                got[key] = output.index + len(output.token_ids)
            flow.acknowledge(frame.sequence)

    for request_id, choice, reads in steps:
        index = sent.get((request_id, choice), 0)
        flow.add(piece(request_id, index, [index], choice=choice))
        sent[(request_id, choice)] = index + 1
        if reads:
            read()
    read()
    assert got == sent
