"""Which scenarios a command runs, with which seeds."""

from __future__ import annotations

from tests.faults import random_ones, rows
from tests.faults.scenario import Scenario

DEFAULT_SEEDS = 12
"""Random ones; more take about eight seconds each."""


def planned(*, quick: bool, seeds: int | None, first: int, only: str) -> list[tuple[Scenario, int]]:
    """Scenarios with seeds. `seeds`: so many random ones besides; None: the default number."""
    found = [(scenario, first) for scenario in rows.every() if scenario.quick or not quick]
    if not quick:
        count = DEFAULT_SEEDS if seeds is None else seeds
        found += [(random_ones.scenario(seed), seed) for seed in range(first, first + count)]
    wanted = [part.strip().lower() for part in only.split(",")]
    return [(one, seed) for one, seed in found if any(part in one.name.lower() for part in wanted)]
