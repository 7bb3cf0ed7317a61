"""Which rows a step computes."""

from __future__ import annotations

import pytest

from worker.backend import Attempt, Epoch
from worker.engine.batch import PREFILL_TOKENS, Batch, plan
from worker.engine.run import Run

pytestmark = pytest.mark.torch


def make_run(name: str, prompt: int, *, choices: int = 1, resume: dict[int, int] | None = None) -> Run:
    answers = {number: [5] * length for number, length in (resume or {}).items()}
    return Run(Attempt(name, Epoch(1, 1), "m", [3] * prompt, 500, choices=choices, resume=answers), frozenset())


def compute(batch: Batch) -> None:
    """What the engine does with the plan, without a model."""
    unfinished = [run for run, _, _ in batch.rows if not run.prompt_done]
    for _, choice, position in batch.rows:
        assert choice.computed == position
        choice.computed += 1
    for run in unfinished:
        if run.prompt_done:
            for choice in run.choices.values():
                choice.computed = max(choice.computed, len(run.prompt))
    for _, choice, _ in batch.picks:
        choice.tokens.append(7)


def spans(batch: Batch, name: str) -> list[int]:
    return [position for run, _, position in batch.rows if run.attempt.request_id == name]


def test_a_prompt_goes_in_whole_chunks_of_at_most_128_rows() -> None:
    run, ends = make_run("a", 300), []
    while not ends or ends[-1] < 299:
        batch = plan([run])
        assert len(batch.rows) <= PREFILL_TOKENS
        ends.append(spans(batch, "a")[-1])
        compute(batch)
    assert ends == [127, 255, 299]
    assert run.choices[0].tokens == [7]


def test_running_streams_get_their_row_beside_a_long_prompt() -> None:
    running, long = make_run("running", 5), make_run("long", 1000)
    compute(plan([running]))
    for _ in range(4):
        batch = plan([running, long])
        assert len(spans(batch, "running")) == 1
        assert len(spans(batch, "long")) == 128
        compute(batch)
    assert len(running.choices[0].tokens) == 5


def test_prompts_share_the_budget_in_order_of_arrival() -> None:
    runs = [make_run("a", 40), make_run("b", 100), make_run("c", 10)]
    batch = plan(runs)
    # b's second chunk (36 rows) does not fit beside 40 + 64, and c waits behind it.
    assert [len(spans(batch, name)) for name in "abc"] == [40, 64, 0]
    compute(batch)
    batch = plan(runs)
    assert [len(spans(batch, name)) for name in "abc"] == [1, 36, 10]


def test_choices_share_one_prefill_and_each_gets_a_token_from_its_last_row() -> None:
    run = make_run("a", 10, choices=3)
    batch = plan([run])
    assert len(batch.rows) == 10
    assert [(choice.number, row) for _, choice, row in batch.picks] == [(0, 9), (1, 9), (2, 9)]
    compute(batch)
    assert [position for _, _, position in plan([run]).rows] == [10, 10, 10]


def test_resumed_tokens_are_computed_after_the_prompt_and_yield_the_next_one() -> None:
    run = make_run("a", 60, choices=2, resume={1: 100})
    first = plan([run])
    assert [choice.number for _, choice, _ in first.picks] == [0]
    compute(first)
    second = plan([run])
    replayed = [position for _, choice, position in second.rows if choice.number == 1]
    assert replayed == list(range(60, 160))
    assert [choice.number for _, choice, _ in second.picks] == [0, 1]
    compute(second)
    assert [len(choice.tokens) for choice in run.choices.values()] == [2, 101]


def test_a_cancelled_leader_still_prefills_for_the_others() -> None:
    run = make_run("a", 200, choices=2)
    compute(plan([run]))
    run.choices[0].keep_until = 0
    run.drop_kept()
    batch = plan([run])
    assert spans(batch, "a") == list(range(128, 200))
    assert [choice.number for _, choice, _ in batch.picks] == [1]
