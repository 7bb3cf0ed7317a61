"""What is made of the times at which tokens came."""

from __future__ import annotations

import math

import pytest

from bench.client import Trace
from bench.service import GAP_BOUND_S, TTFT_BOUND_S, good, percentile, service


def trace(due: float, times: list[float], *, finished: bool = True, error: str = "", tokens: int = 0) -> Trace:
    return Trace(due, tokens or len(times), times, finished, error)


def test_gaps_are_within_requests_and_waits_from_when_they_were_due() -> None:
    found = service([trace(0.0, [1.0, 1.1, 1.2]), trace(0.5, [1.0, 1.3])], 0.0, 2.0)

    assert (found.ttft_p50, found.ttft_p99) == pytest.approx((750.0, 1000.0))
    assert (found.gap_p50, found.gap_p99) == pytest.approx((100.0, 300.0))
    assert found.failed == 0


def test_an_event_may_bring_several_tokens() -> None:
    assert service([trace(0.0, [1.0, 1.1], tokens=8)], 0.0, 2.0).throughput == 4.0


def test_tokens_count_while_it_is_measured() -> None:
    cut_off = trace(0.0, [0.5, 0.6, 0.7, 0.8], finished=False, tokens=100)

    assert service([cut_off], 0.65, 1.65).throughput == pytest.approx(2.0)


@pytest.mark.parametrize(
    "bad",
    [
        trace(0.0, []),
        trace(0.0, [TTFT_BOUND_S + 0.1]),
        trace(0.0, [0.1, 0.1 + GAP_BOUND_S + 0.1]),
        trace(0.0, [0.1, 0.2], error="broke off"),
    ],
)
def test_goodput_leaves_out_what_came_late_or_slowly_or_broke(bad: Trace) -> None:
    fine = trace(0.0, [0.1, 0.2])
    found = service([fine, bad], 0.0, 10.0)

    assert (good(fine), good(bad)) == (True, False)
    assert found.goodput == pytest.approx(0.2)


def test_without_tokens_times_are_infinite() -> None:
    found = service([trace(0.0, [], finished=False)], 0.0, 1.0)

    assert (found.ttft_p50, found.gap_p99, found.goodput, found.failed) == (math.inf, math.inf, 0.0, 1)


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(n) for n in range(100)], 0.99) == 98.0
