"""The scenarios, row by row of the specification."""

from __future__ import annotations

from tests.faults.rows import schedulers, workers
from tests.faults.scenario import Scenario


def every() -> list[Scenario]:
    """All single scenarios, in the order in which they run: those of one shape one after the other."""
    found = [*workers.SCENARIOS, *schedulers.SCENARIOS]
    shapes = list(dict.fromkeys(one.shape for one in found))
    return sorted(found, key=lambda one: shapes.index(one.shape))
