"""Which scenarios a command runs, with which seeds."""

from __future__ import annotations

from tests.faults import random_ones, rows
from tests.faults.scenario import Scenario, on_torch

DEFAULT_SINGLES, MIXED = 12, 6
"""Random single faults, and random pairs and triples; each takes about ten seconds."""


def planned(
    *, quick: bool, seeds: int | None, first: int, only: str, long: bool = False, backend: str = "echo"
) -> list[tuple[Scenario, int]]:
    """Scenarios with seeds. `seeds`: so many random single faults besides, every second one on torch. `long`: minutes
    more. `backend` is that of the others; with `torch`, those that need the echo backend are left out."""
    found = [(scenario, first) for scenario in rows.every(long=long) if scenario.quick or not quick]
    if backend == "torch":
        found = [(real, seed) for scenario, seed in found if (real := on_torch(scenario)) is not None]
    if not quick:
        found += _random(range(first, first + (DEFAULT_SINGLES if seeds is None else seeds)), first)
    wanted = [part.strip().lower() for part in only.split(",")]
    return [(one, seed) for one, seed in found if any(part in one.name.lower() for part in wanted)]


def _random(singles: range, first: int) -> list[tuple[Scenario, int]]:
    """Those of one fleet one after the other."""
    found = [(random_ones.scenario(seed, 1, torch=False), seed) for seed in singles[::2]]
    found += [(random_ones.scenario(seed, 2 + seed % 2, torch=False), seed) for seed in range(first, first + MIXED)]
    return found + [(random_ones.scenario(seed, 1, torch=True), seed) for seed in singles[1::2]]
