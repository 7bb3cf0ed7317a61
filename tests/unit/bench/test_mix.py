"""The served mix."""

from __future__ import annotations

import itertools
import statistics

import pytest

from bench import mix


def test_a_seed_gives_the_same_requests_and_arrivals() -> None:
    assert mix.arrivals(2.0, 30.0, 5000, seed=1) == mix.arrivals(2.0, 30.0, 5000, seed=1)
    assert mix.arrivals(2.0, 30.0, 5000, seed=1) != mix.arrivals(2.0, 30.0, 5000, seed=2)


def test_sizes_keep_to_their_bounds_and_prompts_to_the_text() -> None:
    found = list(itertools.islice(mix.requests(5000, seed=3), 2000))

    assert min(one.prompt_tokens for one in found) >= mix.PROMPT_TOKENS[0]
    assert max(one.first + one.prompt_tokens for one in found) <= 5000
    assert {one.output_tokens for one in found} <= set(range(mix.OUTPUT_TOKENS[0], mix.OUTPUT_TOKENS[1] + 1))
    assert statistics.fmean(one.output_tokens for one in found) == pytest.approx(mix.mean_output_tokens(), rel=0.05)
    assert len({one.first for one in found}) == len(found)


def test_arrivals_are_poisson_with_the_rate_asked_for() -> None:
    times = [arrival.at_s for arrival in mix.arrivals(4.0, 500.0, 5000, seed=5)]
    pauses = [after - before for before, after in itertools.pairwise(times)]

    assert times == sorted(times)
    assert len(times) == pytest.approx(2000, rel=0.1)
    assert statistics.stdev(pauses) == pytest.approx(statistics.fmean(pauses), rel=0.1)


def test_there_is_always_a_request() -> None:
    assert [arrival.at_s for arrival in mix.arrivals(0.001, 1.0, 5000, seed=1)] == [0.0]
