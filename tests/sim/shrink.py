"""Make a failing plan small: leave out faults and clients as long as the same invariant still breaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tests.sim.world import Plan, run

_MOST_RUNS = 60


def shrink(plan: Plan, invariant: str) -> Plan:
    """A plan that breaks the same invariant with as little as was found within a bounded number of runs."""
    runs = 0
    smaller = True
    while smaller:
        smaller = False
        for candidate in _without_one(plan):
            runs += 1
            if runs > _MOST_RUNS:
                return plan
            if any(violation.invariant == invariant for violation in run(candidate).violations):
                plan, smaller = candidate, True
                break
    return plan


def _without_one(plan: Plan) -> Iterator[Plan]:
    for parts in (4, 2, 1):
        for name in ("orders", "faults"):
            everything = getattr(plan, name)
            size = max(1, len(everything) // parts) if parts > 1 else 1
            for start in range(0, len(everything), size):
                kept = everything[:start] + everything[start + size :]
                if name == "faults" or kept:
                    yield replace(plan, **{name: kept})
            if parts == 1:
                continue
