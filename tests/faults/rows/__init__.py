"""The scenarios, row by row of the specification."""

from __future__ import annotations

from tests.faults.rows import clients, crowds, gateways, innocents, networks, schedulers, stalls, stores, workers
from tests.faults.scenario import Scenario


def every(*, long: bool = False) -> list[Scenario]:
    """All single scenarios, in the order in which they run: those of one shape one after the other.

    With `long`, etcd is gone for 10 minutes instead of one.
    """
    found = [
        *workers.SCENARIOS,
        *stalls.SCENARIOS,
        *schedulers.SCENARIOS,
        *stores.SCENARIOS,
        stores.outage(600, 18_600) if long else stores.outage(60, 2100),
        *clients.SCENARIOS,
        *gateways.SCENARIOS,
        *innocents.SCENARIOS,
        *crowds.SCENARIOS,
        *networks.SCENARIOS,
    ]
    shapes = list(dict.fromkeys(one.shape for one in found))
    return sorted(found, key=lambda one: shapes.index(one.shape))
