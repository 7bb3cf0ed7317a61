"""Back-pressure without loss."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.internal.v1 import request_pb2, work_pb2
from llmos.v1 import inference_pb2
from worker.backend import Epoch
from worker.outbox import PIECE_TOKENS, Outbox


def piece(
    index: int, *tokens: int, request_id: str = "a", choice: int = 0, attempt: int = 1, end: bool = False
) -> request_pb2.Output:
    return request_pb2.Output(
        request_id=request_id,
        epoch=request_pb2.Epoch(term=1, attempt=attempt),
        choice=choice,
        index=index,
        token_ids=tokens,
        logprobs=[request_pb2.LogprobEntry(token_id=token, logprob=-1.0) for token in tokens],
        finish_reason=inference_pb2.FINISH_REASON_STOP if end else inference_pb2.FINISH_REASON_UNSPECIFIED,
    )


def everything(request_id: str, epoch: Epoch) -> bool:
    return True


def test_frames_are_counted_and_carry_what_is_pending() -> None:
    box = Outbox()
    box.add(piece(0, 65))
    assert box.sendable
    frame = box.take()
    assert (frame.sequence, [output.index for output in frame.outputs]) == (1, [0])
    assert not box.sendable
    assert not box.empty
    assert box.take().sequence == 2
    box.acknowledge(1)
    assert box.empty


def add(box: Outbox, *pieces: request_pb2.Output) -> work_pb2.WorkFrame:
    frame = work_pb2.WorkFrame(outputs=pieces, failures=[request_pb2.Failure(request_id="said already")])
    box.add_frame(frame, frame.outputs)
    return frame


def test_the_engines_frame_leaves_as_it_is_while_nothing_else_waits() -> None:
    box = Outbox()
    first = add(box, piece(0, 65), piece(0, 65, request_id="b"))
    box.add_failure(request_pb2.Failure(request_id="b"))
    assert not box.empty
    sent = box.take()
    assert sent is first
    assert (sent.sequence, len(sent.outputs), len(sent.failures)) == (1, 2, 1)
    assert not box.sendable


def test_frames_merge_piece_by_piece_once_they_wait() -> None:
    box = Outbox(window=1)
    for index in range(4):
        add(box, piece(index, 65), piece(index, 66, request_id="b"))
        if index == 0:
            box.take()
    box.acknowledge(1)
    assert [(output.request_id, output.index, len(output.token_ids)) for output in box.take().outputs] == [
        ("a", 1, 3),
        ("b", 1, 3),
    ]


def test_what_was_not_taken_of_a_frame_does_not_leave() -> None:
    box, frame = Outbox(), work_pb2.WorkFrame(outputs=[piece(0, 65), piece(0, 65, request_id="b")])
    box.add_frame(frame, frame.outputs[1:])
    assert [output.request_id for output in box.take().outputs] == ["b"]


def test_a_cancelled_request_leaves_a_frame_that_waits() -> None:
    box = Outbox()
    add(box, piece(0, 65), piece(0, 65, request_id="b"))
    assert box.attempts() == {("a", Epoch(1, 1)), ("b", Epoch(1, 1))}
    box.drop("a", Epoch(1, 1))
    assert [output.request_id for output in box.take().outputs] == ["b"]


def test_a_frame_that_is_too_large_goes_in_parts() -> None:
    box = Outbox(frame_bytes=100)
    add(box, *(piece(0, *range(20), request_id=name) for name in "abc"))
    assert [len(box.take().outputs) for _ in range(3)] == [1, 1, 1]


def test_pieces_merge_while_the_window_is_closed() -> None:
    box = Outbox(window=2)
    for index in range(2):
        box.add(piece(index, 65 + index))
        box.take()
    for index in range(2, 500):
        box.add(piece(index, index % 95 + 32, end=index == 499))
    assert not box.sendable
    assert list(box.take().outputs) == []
    box.acknowledge(1)
    (output,) = box.take().outputs
    assert (output.index, len(output.token_ids), len(output.logprobs)) == (2, 498, 498)
    assert output.finish_reason == inference_pb2.FINISH_REASON_STOP
    assert [entry.token_id for entry in output.logprobs] == list(output.token_ids)


def test_heartbeats_without_content_do_not_fill_the_window() -> None:
    box = Outbox(window=2)
    for _ in range(100):
        box.take()
    box.add(piece(0, 65))
    assert box.sendable


@pytest.mark.parametrize(
    "following",
    [piece(5, 66), piece(1, 66, choice=1), piece(1, 66, attempt=2), piece(1, 66, request_id="b")],
    ids=["gap", "choice", "epoch", "request"],
)
def test_only_continuations_merge(following: request_pb2.Output) -> None:
    box = Outbox()
    box.add(piece(0, 65))
    box.add(following)
    assert len(box.take().outputs) == 2


def test_pieces_and_frames_are_bounded() -> None:
    box = Outbox(frame_bytes=10_000)
    for index in range(3 * PIECE_TOKENS):
        box.add(piece(index, 65))
    box.add_failure(request_pb2.Failure(request_id="a", code="attempt_lost"))
    frames = []
    while box.sendable:
        frames.append(box.take())
    assert [len(frame.outputs[0].token_ids) for frame in frames] == [PIECE_TOKENS] * 3
    # A failure ends the attempt for its receiver: nothing of the attempt may come after it.
    assert [len(frame.failures) for frame in frames] == [0, 0, 1]


def test_a_new_stream_gets_what_was_not_acknowledged_first() -> None:
    box = Outbox()
    for index in range(4):
        box.add(piece(index, 65 + index))
        box.take()
    box.acknowledge(2)
    box.add(piece(4, 69))
    box.add_failure(request_pb2.Failure(request_id="z"))
    box.attach(everything)
    frame = box.take()
    assert frame.sequence == 1
    assert [(output.index, list(output.token_ids)) for output in frame.outputs] == [(2, [67, 68, 69])]
    assert [failure.request_id for failure in frame.failures] == ["z"]


def test_unacknowledged_failures_are_said_again() -> None:
    box = Outbox()
    box.add_failure(request_pb2.Failure(request_id="z"))
    box.take()
    box.attach(everything)
    assert [failure.request_id for failure in box.take().failures] == ["z"]


def test_cancelled_attempts_are_not_said_again() -> None:
    box = Outbox()
    box.add(piece(0, 65))
    box.add(piece(0, 65, request_id="b"))
    box.take()
    box.attach(lambda request_id, epoch: request_id != "a")
    assert [output.request_id for output in box.take().outputs] == ["b"]


def test_drop_forgets_attempts_up_to_the_epoch() -> None:
    box = Outbox()
    box.add(piece(0, 65, attempt=1))
    box.add(piece(0, 66, choice=1, attempt=2))
    box.add(piece(0, 67, choice=2, attempt=3))
    box.drop("a", Epoch(1, 2))
    box.drop("unknown", Epoch(1, 2))
    assert [output.epoch.attempt for output in box.take().outputs] == [3]


def test_attempts_counts_sent_and_unsent_pieces() -> None:
    box = Outbox()
    box.add(piece(0, 65))
    box.take()
    box.add(piece(0, 65, request_id="b", attempt=4))
    assert box.attempts() == {("a", Epoch(1, 1)), ("b", Epoch(1, 4))}
    box.acknowledge(1)
    assert box.attempts() == {("b", Epoch(1, 4))}


STREAMS = [("a", 0), ("a", 1), ("b", 0)]
ACTIONS = st.one_of(
    st.tuples(st.just("produce"), st.integers(0, 2)),
    st.tuples(st.just("send"), st.booleans()),
    st.tuples(st.just("acknowledge"), st.integers(0, 3)),
    st.tuples(st.just("break"), st.just(0)),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(ACTIONS, max_size=120))
def test_whatever_breaks_nothing_is_lost_or_out_of_order(actions: list[tuple[str, int]]) -> None:
    """Frames sent into a broken stream may or may not arrive; the receiver takes only the next index."""
    box = Outbox(window=3, frame_bytes=100)
    produced = dict.fromkeys(STREAMS, 0)
    received = dict.fromkeys(STREAMS, 0)
    sequence = acknowledged = 0

    def deliver(arrives: bool) -> None:
        nonlocal sequence
        frame = box.take()
        if not arrives:
            return
        if frame.sequence == sequence + 1:
            sequence = frame.sequence
            for output in frame.outputs:
                key = output.request_id, output.choice
                assert output.index <= received[key], "a gap"
                received[key] = max(received[key], output.index + len(output.token_ids))

    def reattach() -> None:
        nonlocal sequence, acknowledged
        box.attach(everything)
        sequence = acknowledged = 0

    for action, value in actions:
        if action == "produce":
            key = STREAMS[value]
            box.add(piece(produced[key], 65, request_id=key[0], choice=key[1]))
            produced[key] += 1
        elif action == "send":
            deliver(bool(value))
        elif action == "acknowledge":
            acknowledged = max(acknowledged, sequence - value)
            box.acknowledge(acknowledged)
        else:
            reattach()
    reattach()
    while not box.empty:
        deliver(True)
        box.acknowledge(sequence)
    assert received == produced
