"""Epochs, duplicates, tombstones."""

from __future__ import annotations

from llmos.internal.v1 import request_pb2, work_pb2
from llmos.v1 import inference_pb2
from worker.attempts import AttemptTable, Verdict
from worker.backend import Epoch


def dispatch(
    request_id: str = "a", term: int = 1, attempt: int = 1, choices: int = 1, **resume: int
) -> work_pb2.Dispatch:
    entries = [request_pb2.ChoiceResume(choice=int(name[1:]), token_ids=[65] * count) for name, count in resume.items()]
    request = request_pb2.Request(request_id=request_id, model="echo", choices=choices, resume=entries)
    return work_pb2.Dispatch(epoch=request_pb2.Epoch(term=term, attempt=attempt), request=request)


def output(index: int, count: int = 1, choice: int = 0, end: bool = False) -> request_pb2.Output:
    reason = inference_pb2.FINISH_REASON_STOP if end else inference_pb2.FINISH_REASON_UNSPECIFIED
    return request_pb2.Output(
        request_id="a",
        epoch=request_pb2.Epoch(term=1, attempt=1),
        choice=choice,
        index=index,
        token_ids=[65] * count,
        finish_reason=reason,
    )


def test_a_running_attempt_judges_what_comes_after() -> None:
    table = AttemptTable()
    assert table.judge(dispatch(term=5, attempt=2), 0) is Verdict.BEGIN
    table.begin(dispatch(term=5, attempt=2))
    assert table.judge(dispatch(term=5, attempt=2), 0) is Verdict.DUPLICATE
    assert table.judge(dispatch(term=5, attempt=1), 0) is Verdict.STALE
    assert table.judge(dispatch(term=4, attempt=9), 0) is Verdict.STALE
    assert table.judge(dispatch(term=5, attempt=3), 0) is Verdict.REPLACE
    assert table.judge(dispatch(term=6, attempt=1), 0) is Verdict.REPLACE
    assert table.judge(dispatch("b"), 0) is Verdict.BEGIN
    assert table.counts == {"begin": 2, "duplicate": 1, "stale": 2, "replace": 2}


def test_an_ended_attempt_is_not_computed_again() -> None:
    table = AttemptTable(ttl_s=100)
    table.begin(dispatch(attempt=2))
    table.end("a", 0)
    assert len(table) == 0
    assert table.judge(dispatch(attempt=2), 50) is Verdict.DUPLICATE
    assert table.judge(dispatch(attempt=1), 50) is Verdict.STALE
    assert table.judge(dispatch(attempt=3), 50) is Verdict.BEGIN
    assert table.judge(dispatch(attempt=2), 101) is Verdict.BEGIN


def test_a_cancel_wins_against_a_dispatch_that_comes_later() -> None:
    table = AttemptTable()
    assert not table.cancel("a", Epoch(1, 2), 0)
    assert table.judge(dispatch(attempt=1), 1) is Verdict.TOMBSTONE
    assert table.judge(dispatch(attempt=2), 1) is Verdict.TOMBSTONE
    assert table.judge(dispatch(attempt=3), 1) is Verdict.BEGIN
    assert table.is_cancelled("a", Epoch(1, 2))
    assert not table.is_cancelled("a", Epoch(1, 3))


def test_a_cancel_of_an_older_attempt_leaves_the_newer_one() -> None:
    table = AttemptTable()
    table.begin(dispatch(attempt=3))
    assert not table.cancel("a", Epoch(1, 2), 0)
    assert len(table) == 1
    assert table.cancel("a", Epoch(1, 3), 0)
    assert len(table) == 0


def test_a_lower_cancel_does_not_lower_the_fence() -> None:
    table = AttemptTable()
    table.cancel("a", Epoch(1, 5), 0)
    table.cancel("a", Epoch(1, 2), 0)
    assert table.judge(dispatch(attempt=5), 1) is Verdict.TOMBSTONE


def test_a_cancel_after_the_end_makes_a_tombstone_of_the_fence() -> None:
    table = AttemptTable()
    table.begin(dispatch())
    table.end("a", 0)
    assert not table.is_cancelled("a", Epoch(1, 1))
    table.cancel("a", Epoch(1, 1), 0)
    assert table.is_cancelled("a", Epoch(1, 1))


def test_tombstones_are_bounded_and_expire() -> None:
    table = AttemptTable(ttl_s=10, limit=3)
    for number in range(5):
        table.cancel(f"r{number}", Epoch(1, 1), number)
    assert table.judge(dispatch("r1"), 5) is Verdict.BEGIN
    assert table.judge(dispatch("r2"), 5) is Verdict.TOMBSTONE
    table.cancel("late", Epoch(1, 1), 100)
    assert not table.is_cancelled("r4", Epoch(1, 1))


def test_completion_counts_choices() -> None:
    table = AttemptTable()
    running = table.begin(dispatch(choices=2, c1=3))
    assert running.next_index(0) == 0
    assert running.next_index(1) == 3
    assert not table.advance(output(0, end=True))
    assert not table.advance(output(3, choice=1))
    assert table.advance(output(4, choice=1, end=True))


def test_a_kept_choice_is_complete_at_its_limit() -> None:
    table = AttemptTable()
    table.begin(dispatch(choices=2))
    table.advance(output(0, count=3))
    assert not table.keep("a", 0, 2)
    assert not table.keep("a", 1, 2)
    assert not table.advance(output(0, choice=1))
    assert table.advance(output(1, choice=1))
    assert not table.keep("unknown", 0, 1)
