"""`StepCost` from measured steps: non-negative least squares. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.simulated.cost import StepCost


@dataclass(frozen=True, slots=True)
class Sample:
    """A step and the seconds that it took."""

    decodes: int
    """Sequences that got a token each."""
    context: int
    """Tokens that these attended to, all together."""
    prefill: int
    """Prompt tokens computed."""
    attended: int
    """Tokens that those attended to, all together."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients and how far off they are, as shares of the steps' times."""

    cost: StepCost
    median_error: float
    worst_tenth: float
    """A tenth of the errors is larger."""


def fit(measured: Sequence[Sample]) -> Fit:
    """Non-negative least squares of relative errors."""
    features = np.array([_features(one) for one in measured], dtype=np.float64)
    seconds = np.array([one.seconds for one in measured])
    scaled = features / seconds[:, None]
    found = _non_negative(scaled, np.ones(len(measured)))
    errors = np.abs(scaled @ found - 1.0)
    cost = StepCost(*(float(f"{value:.4g}") for value in found))
    return Fit(cost, float(np.median(errors)), float(np.quantile(errors, 0.9)))


def quickest(measured: Iterable[Sample]) -> list[Sample]:
    """Of equal steps the quickest: what else ran on the machine only ever made one slower."""
    best: dict[tuple[int, int, int, int], Sample] = {}
    for one in measured:
        kind = (one.decodes, one.context, one.prefill, one.attended)
        if kind not in best or one.seconds < best[kind].seconds:
            best[kind] = one
    return list(best.values())


def _features(one: Sample) -> tuple[float, ...]:
    """In the order of `StepCost`'s fields."""
    return (1.0, one.decodes, one.context, float(one.prefill > 0), one.prefill, one.attended)


def _non_negative(features: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares with no coefficient below zero: the most negative one is left out until there is none."""
    used = list(range(features.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(features[:, used], wanted, rcond=None)
        if (found >= 0).all():
            break
        used.pop(int(np.argmin(found * np.abs(features[:, used]).mean(axis=0))))
    result = np.zeros(features.shape[1])
    result[used] = found
    return result
