"""Which rows a step computes."""

from __future__ import annotations

import pytest

from tests.fakes.kv import NotedMemory
from worker.backend import Attempt, Epoch
from worker.engine.batch import PREFILL_TOKENS, Batch, plan
from worker.engine.blocks import BlockManager
from worker.engine.run import Run

pytestmark = pytest.mark.torch


def make_run(name: str, prompt: int, *, choices: int = 1, resume: dict[int, int] | None = None) -> Run:
    answers = {number: [5] * length for number, length in (resume or {}).items()}
    run = Run(Attempt(name, Epoch(1, 1), "m", [3] * prompt, 500, choices=choices, resume=answers), frozenset())
    run.start(BlockManager(100), NotedMemory())
    return run


def compute(batch: Batch, token: int = 7) -> None:
    """What the engine does with the plan, without a model."""
    pickers = list(batch.pickers())
    for span in batch.spans:
        assert span.kv.computed == span.first
        span.kv.reserve(span.end)
    batch.computed()
    for picker in pickers:
        picker.run.append(picker.choice, token)


def rows(batch: Batch) -> int:
    return sum(span.end - span.first for span in batch.spans)


def positions(batch: Batch, name: str, choice: int | None = None) -> list[int]:
    return [
        position
        for span in batch.spans
        if span.run.attempt.request_id == name and choice in (None, span.choice and span.choice.number)
        for position in range(span.first, span.end)
    ]


def picks(batch: Batch) -> list[tuple[int, list[int]]]:
    return [(picker.choice.number, list(picker.rows)) for picker in batch.pickers()]


def test_a_prompt_goes_in_whole_chunks_of_at_most_128_rows() -> None:
    run, ends = make_run("a", 300), []
    while not ends or ends[-1] < 299:
        batch = plan([run])
        assert rows(batch) <= PREFILL_TOKENS
        ends.append(positions(batch, "a")[-1])
        compute(batch)
    assert ends == [127, 255, 299]
    assert run.choices[0].tokens == [7]


def test_running_streams_get_their_row_beside_a_long_prompt() -> None:
    running, long = make_run("running", 5), make_run("long", 1000)
    compute(plan([running]))
    for _ in range(4):
        batch = plan([running, long])
        assert len(positions(batch, "running")) == 1
        assert len(positions(batch, "long")) == 128
        compute(batch)
    assert len(running.choices[0].tokens) == 5


def test_prompts_share_the_budget_in_order_of_arrival() -> None:
    runs = [make_run("a", 40), make_run("b", 100), make_run("c", 10)]
    batch = plan(runs)
    # b's second chunk (36 rows) does not fit beside 40 + 64, and c waits behind it.
    assert [len(positions(batch, name)) for name in "abc"] == [40, 64, 0]
    compute(batch)
    batch = plan(runs)
    assert [len(positions(batch, name)) for name in "abc"] == [1, 36, 10]


def test_choices_share_one_prefill_and_each_gets_a_token_from_its_last_row() -> None:
    run = make_run("a", 10, choices=3)
    batch = plan([run])
    assert rows(batch) == 10
    assert picks(batch) == [(0, [9]), (1, [9]), (2, [9])]
    compute(batch)
    assert positions(plan([run]), "a") == [10, 10, 10]


def test_resumed_tokens_are_computed_after_the_prompt_and_yield_the_next_one() -> None:
    run = make_run("a", 60, choices=2, resume={1: 100})
    first = plan([run])
    assert picks(first) == [(0, [59])]
    compute(first)
    second = plan([run])
    assert positions(second, "a", 1) == list(range(60, 160))
    assert picks(second) == [(0, [0]), (1, [100])]
    compute(second)
    assert [len(choice.tokens) for choice in run.choices.values()] == [2, 101]


def test_a_prompt_is_computed_on_for_the_choices_that_are_left() -> None:
    run = make_run("a", 200, choices=2)
    compute(plan([run]))
    run.drop(run.choices[0])
    batch = plan([run])
    assert positions(batch, "a") == list(range(128, 200))
    assert picks(batch) == [(1, [71])]


def test_a_draft_adds_rows_that_count_only_once_it_has_proved_right() -> None:
    run = make_run("a", 10, choices=2)
    compute(plan([run]))
    batch = plan([run], lambda run, choice: [7, 7, 9] if choice.number else [])
    assert positions(batch, "a", 1) == [10, 11, 12, 13]
    assert picks(batch) == [(0, [0]), (1, [1, 2, 3, 4])]
    assert batch.spans[1].tokens == [7, 7, 7, 9]
    compute(batch)
    assert [choice.kv.computed for choice in run.choices.values()] == [11, 11]
    batch.spans[1].drop_draft()
    assert positions(batch, "a", 1) == [10]
