"""The sampler against references that are written out in plain Python."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from worker.backend import Sampling
from worker.engine.philox import gumbel, token_words
from worker.engine.sampling import SamplingRow, sample

pytestmark = pytest.mark.torch

VOCABULARY = 53


def logits_of(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def row_of(sampling: Sampling, generated: tuple[int, ...] = (), choice: int = 0, **more: object) -> SamplingRow:
    row = SamplingRow(sampling, choice, (1, 2, 3), generated)
    return replace(row, **more)  # type: ignore[arg-type]


def token_of(logits: Tensor, row: SamplingRow) -> int:
    [pick] = sample(logits[None], [row])
    assert pick is not None
    return pick.token_id


def noise_of(row: SamplingRow) -> list[float]:
    key = (torch.tensor([number]) for number in (row.sampling.seed, row.choice, row.index))
    return gumbel(token_words(*key, VOCABULARY))[0].tolist()


def reference_filter(scaled: list[float], options: Sampling) -> set[int]:
    """Tokens that min-p, top-k and top-p keep, by their definitions."""
    kept = set(range(len(scaled)))
    if options.min_p > 0:
        weights = [math.exp(value - max(scaled)) for value in scaled]
        kept = {token for token in kept if weights[token] >= options.min_p * max(weights)}
    if options.top_k:
        ranked = sorted(kept, key=lambda token: -scaled[token])
        kept = set(ranked[: options.top_k])
    if options.top_p < 1:
        total = sum(math.exp(scaled[token]) for token in kept)
        nucleus: set[int] = set()
        reached = 0.0
        for token in sorted(kept, key=lambda token: -scaled[token]):
            if nucleus and reached >= options.top_p:
                break
            nucleus.add(token)
            reached += math.exp(scaled[token]) / total
        kept = nucleus
    return kept


@pytest.mark.parametrize(
    "options",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=1),
        Sampling(temperature=1.3, top_k=5),
        Sampling(temperature=2.0, top_p=0.5),
        Sampling(temperature=2.0, top_p=0.0),
        Sampling(temperature=2.0, min_p=0.1),
        Sampling(temperature=1.5, top_k=20, top_p=0.8, min_p=0.01),
    ],
)
def test_filters_and_draws_as_defined(options: Sampling) -> None:
    logits = logits_of(1)[0]
    scaled = [value / options.temperature for value in logits.double().tolist()]
    kept = reference_filter(scaled, options)
    seen = set()
    for seed in range(120):
        row = row_of(replace(options, seed=seed))
        noise = noise_of(row)
        expected = max(kept, key=lambda token, noise=noise: scaled[token] + noise[token])  # type: ignore[misc]
        assert token_of(logits, row) == expected
        seen.add(expected)
    assert len(seen) > min(len(kept), 4) - 1


def test_top_p_looks_past_its_first_candidates() -> None:
    logits = torch.zeros(1, 5000)
    logits[0, :10] = 1.0
    options = Sampling(temperature=1.0, top_p=0.9)
    picks = sample(logits.expand(60, -1), [row_of(replace(options, seed=seed)) for seed in range(60)])
    assert any(pick is not None and pick.token_id > 3000 for pick in picks)


def test_values_that_tie_with_the_last_one_kept_are_kept() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    picks = sample(logits.expand(300, -1), [row_of(Sampling(top_k=2, seed=seed)) for seed in range(300)])
    assert {pick.token_id for pick in picks if pick is not None} == {1, 2, 3, 4}


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    assert token_of(torch.tensor([0.0, 2.0, 1.0, 2.0]), row_of(Sampling(temperature=0))) == 1


def test_draws_follow_the_distribution() -> None:
    # 24.32 is the 0.999 quantile of chi-square with 7 degrees of freedom; the seeds are fixed.
    weights = [0.30, 0.20, 0.15, 0.12, 0.10, 0.06, 0.05, 0.02]
    logits = torch.tensor(weights).log().expand(250, -1)
    for temperature, vary in ((1.0, "index"), (1.0, "seed"), (1.0, "choice"), (2.0, "seed")):
        counts: Counter[int] = Counter()
        for part in range(10):
            numbers = range(part * 250, part * 250 + 250)
            picks = sample(logits, [_varied(temperature, vary, number) for number in numbers])
            counts.update(pick.token_id for pick in picks if pick)
        powers = [weight ** (1 / temperature) for weight in weights]
        expected = [2500 * power / sum(powers) for power in powers]
        statistic = sum((counts[token] - count) ** 2 / count for token, count in enumerate(expected))
        assert statistic < 24.32, (temperature, vary)


def _varied(temperature: float, vary: str, number: int) -> SamplingRow:
    options = Sampling(temperature=temperature, seed=number if vary == "seed" else 5)
    generated = (0,) * number if vary == "index" else ()
    return row_of(options, generated, choice=number if vary == "choice" else 0)


def test_penalties_and_bias_as_defined() -> None:
    logits = logits_of(1, seed=4)[0]
    generated = (4, 4, 4, 9, 2)
    options = Sampling(
        temperature=0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.7,
        logit_bias={0: -2.0, 9: 4.0, 30: 3.0},
    )
    expected = logits.tolist()
    for token, bias in options.logit_bias.items():
        expected[token] += bias
    for token in {1, 2, 3, *generated}:
        value = expected[token]
        expected[token] = value / 1.7 if value > 0 else value * 1.7
    for token, times in Counter(generated).items():
        expected[token] -= 0.25 * times + 0.5
    for barred in range(VOCABULARY):
        # Barring all better ones each time reads out the whole order.
        order = sorted(range(VOCABULARY), key=lambda token: -expected[token])
        row = row_of(options, generated, barred=frozenset(order[:barred]))
        assert token_of(logits, row) == order[barred]


def test_repetition_penalty_reaches_the_prompt_and_presence_penalty_does_not() -> None:
    logits = torch.tensor([0.0, 2.0, 0.0, 0.0, 1.9])
    assert token_of(logits, row_of(Sampling(temperature=0, presence_penalty=2.0))) == 1
    assert token_of(logits, row_of(Sampling(temperature=0, repetition_penalty=1.5))) == 4


def test_barred_tokens_are_never_drawn() -> None:
    logits = torch.zeros(4)
    rows = [row_of(Sampling(seed=seed), barred=frozenset({0, 2})) for seed in range(100)]
    picks = sample(logits.expand(100, -1), rows)
    assert {pick.token_id for pick in picks if pick} == {1, 3}


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = logits_of(1, seed=2)[0]
    options = Sampling(temperature=2.0, logit_bias={7: 100.0}, logprobs=3)
    [pick] = sample(logits[None], [row_of(options)])
    assert pick is not None and pick.logprob is not None
    expected = logits.log_softmax(-1)
    assert pick.token_id == pick.logprob.token_id == 7
    assert pick.logprob.logprob == pytest.approx(float(expected[7]))
    best = expected.topk(3)
    assert [token for token, _ in pick.logprob.top] == best.indices.tolist()
    assert [value for _, value in pick.logprob.top] == pytest.approx(best.values.tolist())


def test_logprobs_without_alternatives_and_with_ties() -> None:
    [none] = sample(logits_of(1), [row_of(Sampling(temperature=0, logprobs=0))])
    [tied] = sample(torch.tensor([[1.0, 1.0, 1.0, 0.0]]), [row_of(Sampling(temperature=0, logprobs=2))])
    assert none is not None and none.logprob is not None and none.logprob.top == []
    assert tied is not None and tied.logprob is not None
    assert [token for token, _ in tied.logprob.top] == [0, 1]


def every_kind_of_row() -> list[SamplingRow]:
    kinds = [
        Sampling(temperature=0),
        Sampling(temperature=0.8, seed=1),
        Sampling(temperature=1.2, seed=2, top_p=0.7),
        Sampling(temperature=1.0, seed=2**64 - 1, top_k=7),
        Sampling(temperature=1.0, seed=4, min_p=0.05, logprobs=2),
        Sampling(temperature=1.0, seed=5, presence_penalty=1.0, logit_bias={3: 1.0}),
        Sampling(temperature=0, repetition_penalty=1.3, logprobs=0),
    ]
    return [row_of(kind, tuple(range(number)), choice=number % 3) for number, kind in enumerate(kinds * 3)]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_has_the_same_pick_alone_and_in_any_batch(threads: int, torch_threads: None) -> None:
    rows, logits = every_kind_of_row(), logits_of(21, seed=9)
    torch.set_num_threads(1)
    alone = [sample(logits[number : number + 1], [row])[0] for number, row in enumerate(rows)]
    torch.set_num_threads(threads)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(threads)).tolist()
    together = sample(logits[order], [rows[number] for number in order])
    assert together == [alone[number] for number in order]


def test_the_logits_are_left_as_they_were() -> None:
    rows, logits = every_kind_of_row(), logits_of(21)
    before = logits.clone()
    sample(logits, rows)
    assert torch.equal(before, logits)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_that_is_not_a_number_gets_no_pick_and_harms_no_other(poison: float) -> None:
    rows, logits = every_kind_of_row(), logits_of(21)
    expected = sample(logits, rows)
    logits[5, 11] = poison
    picks = sample(logits, rows)
    assert picks[5] is None
    assert picks[:5] + picks[6:] == expected[:5] + expected[6:]
