"""What is guessed, and how far."""

from __future__ import annotations

import pytest

from tests.fakes.kv import NotedMemory
from worker.backend import Attempt, Epoch
from worker.demand import LOGIT_ROWS
from worker.engine.batch import plan
from worker.engine.blocks import BlockManager
from worker.engine.draft import Drafting, StepCost
from worker.engine.lookup import LONGEST, Lookup, followers
from worker.engine.run import Run

pytestmark = pytest.mark.torch


def lookup(prompt: list[int], answer: list[int]) -> Lookup:
    made = Lookup(prompt, followers(prompt))
    made.learn(answer)
    return made


def test_what_followed_last_is_guessed() -> None:
    assert list(lookup([1, 2, 3, 4, 9, 1, 2], []).guess()) == [3, 4, 9, 1, 2]
    assert list(lookup([1, 2, 3, 1, 2, 4, 8], [1, 2]).guess()) == [4, 8, 1, 2]
    assert list(lookup([1, 2, 3], [5, 1, 2, 6, 1, 2]).guess())[:2] == [6, 1]
    assert list(lookup([1, 2, 3], [2]).guess()) == []
    assert list(lookup([7], []).guess()) == []
    assert len(lookup(list(range(50)) * 2, []).guess()) == LONGEST


def test_the_estimate_follows_what_comes_true() -> None:
    made = lookup([1, 2, 3, 4, 5, 6, 1, 2], [])
    made.guess()
    before = made.estimate
    made.learn([3, 4, 5])
    right = made.estimate
    assert right > before
    made.guess()
    made.learn([3, 4, 5, 9, 9, 9])
    assert before < made.estimate < right  # only the first wrong one counts


def test_the_cost_of_a_row_is_learned() -> None:
    cost = StepCost()
    for number in range(200):
        rows = 1 + number % 7
        cost.add(rows, 0.010 + 0.002 * rows)
    assert cost.per_row == pytest.approx(0.002, rel=0.05)
    assert cost.of(4) == pytest.approx(0.018, rel=0.05)
    for _ in range(500):
        cost.add(16, 0.042)  # one size alone says nothing of the slope
    assert cost.of(16) == pytest.approx(0.042, rel=0.01)
    assert cost.per_row == pytest.approx(0.002, rel=0.3)


def decoding(prompt: list[int], choices: int = 1, max_tokens: int = 100) -> Run:
    run = Run(Attempt("a", Epoch(1, 1), "m", prompt, max_tokens, choices=choices), frozenset())
    run.start(BlockManager(10), NotedMemory())
    run.prompt_computed(len(prompt))
    for choice in run.choices.values():
        run.append(choice, prompt[0])
    return run


def guessed(drafting: Drafting, run: Run) -> list[int]:
    drafting.begin([run], 128)
    return [len(span.draft) for span in plan([run], drafting.propose).spans]


def test_guesses_that_come_true_grow_and_others_are_given_up() -> None:
    prompt = list(range(40))
    run, drafting = decoding(prompt), Drafting()
    [choice] = run.choices.values()
    run.append(choice, 1)
    lengths = []
    for token in range(2, 30):
        lengths.append(guessed(drafting, run)[0])
        run.append(choice, token)
    assert lengths[0] >= 1
    assert lengths[-1] > lengths[0]
    for number in range(20):
        run.append(choice, 3)
        run.append(choice, 4)
        last = guessed(drafting, run)[0]
        run.append(choice, 100 + number)
    assert last == 0
    assert choice.lookup is not None and choice.lookup.estimate < 0.2


def test_no_more_is_guessed_than_may_still_come() -> None:
    drafting = Drafting()
    for max_tokens, most in ((3, 0), (4, 1)):
        run = decoding(list(range(40)), max_tokens=max_tokens)
        run.append(run.choices[0], 1)
        assert guessed(drafting, run)[0] <= most
    run = decoding(list(range(40)))
    run.append(run.choices[0], 1)
    run.choices[0].keep_until = 3
    assert guessed(drafting, run) == [0]


def test_nothing_is_guessed_where_rows_cost_what_they_bring() -> None:
    run, drafting = decoding(list(range(40)), choices=2), Drafting()
    for choice in run.choices.values():
        run.append(choice, 1)
    assert sum(guessed(drafting, run)) > 0
    for rows in (1, 8) * 50:
        drafting.cost.add(rows, 0.001 * rows)
    assert sum(guessed(drafting, run)) == 0


def test_guesses_stay_within_the_memory_for_logits_however_little_rows_cost() -> None:
    run, drafting = decoding(list(range(40)), choices=16), Drafting()
    for choice in run.choices.values():
        run.append(choice, 1)
        run.append(choice, 2)
    drafting.cost.per_row = 1e-9
    rows = [1 + length for length in guessed(drafting, run)]
    assert len(rows) == 16 and sum(rows) == LOGIT_ROWS
