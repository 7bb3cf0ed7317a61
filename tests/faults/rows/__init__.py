"""The scenarios, row by row of the specification."""

from __future__ import annotations

from tests.faults.rows import clients, gateways, innocents, schedulers, stalls, stores, workers
from tests.faults.scenario import Scenario


def every(*, full: bool = False) -> list[Scenario]:
    """All single scenarios, in the order in which they run: those of one shape one after the other.

    `full` adds those that last minutes.
    """
    found = [
        *workers.SCENARIOS,
        *stalls.SCENARIOS,
        *schedulers.SCENARIOS,
        *stores.SCENARIOS,
        *clients.SCENARIOS,
        *gateways.SCENARIOS,
        *innocents.SCENARIOS,
    ]
    if full:
        found += [stores.outage(600, 18_000)]
    shapes = list(dict.fromkeys(one.shape for one in found))
    return sorted(found, key=lambda one: shapes.index(one.shape))
