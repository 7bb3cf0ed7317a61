"""The cheapest plan of precisions that stays within a bound on quality: all int8, then the most sensitive ones in fp16.

Pure: measuring and ranking are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from llmos.store.precision import PrecisionPlan
from worker.quality.distance import Distance

_MARGIN = 0.8
"""Share of the bound that is aimed at: the ranking is an estimate."""
_SHRINK = 0.5
_ATTEMPTS = 5
"""Mixed plans that are measured before fp16 everywhere."""


@dataclass(frozen=True, slots=True)
class Bound:
    """How far from fp32 a plan may be."""

    kl: float = 0.005
    """Nats per token, in the mean."""
    perplexity: float = 0.005
    """Share by which the perplexity may differ, either way."""

    def holds(self, found: Distance) -> bool:
        """Whether a distance is within the bound. One that is not a number is not."""
        return found.kl <= self.kl and abs(found.perplexity_ratio - 1) <= self.perplexity


class Sensitivity(NamedTuple):
    """What int8 costs in one matrix."""

    share: float
    """Its part of the distance, on any scale that the matrices of a model have in common."""
    numbers: int
    """Its weights."""


Measure = Callable[[PrecisionPlan], Distance]
Rank = Callable[[], Mapping[str, Sensitivity]]


def search(layers: int, measure: Measure, rank: Rank, bound: Bound) -> tuple[PrecisionPlan, Distance | None]:
    """The plan, and what was measured of it; all fp32 and None if not even fp16 is within the bound.

    One measurement if int8 is good enough everywhere, at most seven otherwise.
    """
    plan = PrecisionPlan.uniform("int8", layers)
    found = measure(plan)
    if bound.holds(found):
        return plan, found
    ranked = rank()
    remaining = min(_MARGIN * bound.kl / found.kl if found.kl > bound.kl else _SHRINK, _SHRINK)
    for _ in range(_ATTEMPTS):
        plan = plan.changed(dict.fromkeys(_most_sensitive(ranked, remaining), "fp16"))
        found = measure(plan)
        if bound.holds(found):
            return plan, found
        remaining *= _SHRINK
    plan = PrecisionPlan.uniform("fp16", layers)
    found = measure(plan)
    return (plan, found) if bound.holds(found) else (PrecisionPlan.uniform("fp32", layers), None)


def _most_sensitive(ranked: Mapping[str, Sensitivity], remaining: float) -> list[str]:
    """Matrices, those that cost most per weight first, until the others have at most `remaining` of the whole."""
    chosen: list[str] = []
    left = sum(matrix.share for matrix in ranked.values())
    limit = remaining * left
    for name, matrix in sorted(ranked.items(), key=lambda item: (-item[1].share / item[1].numbers, item[0])):
        if left <= limit:
            break
        chosen.append(name)
        left -= matrix.share
    return chosen
