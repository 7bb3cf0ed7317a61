"""The cells of the comparison, a workload on a fleet each, and one run of an entrant in a cell."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.simulated.cost import StepCost, fitted
from bench.simulated.engine import Engine
from bench.simulated.entrants import OURS, Parameters, named
from bench.simulated.fleet import Fleet
from bench.simulated.traffic import Fate, Workload
from bench.simulated.workloads import Chat, bursty, documents, percentile, shared_prompts

KV_BLOCKS = 1024
"""Of every worker: 65,536 tokens, about 1.5 GiB of the default model."""
WARM = 0.25
"""Share of a run that is not counted: caches and estimates begin empty."""
WORST_S = 120.0
"""A first token that never comes counts as one after so long."""

WORKLOADS: dict[str, Callable[[int, float, float], Workload]] = {
    "shared prompts": shared_prompts,
    "chat": Chat,
    "documents": documents,
    "bursty tenants": bursty,
}
FLEETS: dict[str, tuple[float, ...]] = {
    "4 equal": (1.0,) * 4,
    "16 equal": (1.0,) * 16,
    "8 mixed": (1.0, 1.0, 1.0, 1.5, 2.0, 2.0, 3.0, 4.0),
}
"""Speeds of the workers, in those of the machine that the engine model was fitted on."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A workload on a fleet."""

    workload: str
    fleet: str

    @property
    def name(self) -> str:
        """As in the rows."""
        return f"{self.workload}, {self.fleet}"


CELLS = tuple(Cell(workload, fleet) for workload, fleet in itertools.product(WORKLOADS, FLEETS))


@dataclass(frozen=True, slots=True)
class Result:
    """What an entrant came to in one run."""

    lateness: float
    """p99 of the time to first token, in shares of what the client wanted: 1 is just in time."""
    ttft_s: float
    """p99 of the time to first token."""
    goodput: float
    """Tokens per second of requests that met their bounds."""
    good: float
    """Share of requests that did."""
    cached: float
    """Share of prompt tokens that were found in a cache."""
    busy: float
    """Share of time in which workers computed, on average."""
    requests: int


def simulate(
    cell: Cell, entrant: str, parameters: Parameters, *, rate: float, duration: float, seed: int, cost: StepCost
) -> tuple[list[Fate], Sequence[Engine], float]:
    """All requests, the engines as they are in the end, and when that was."""
    engines = [Engine(KV_BLOCKS, cost, speed=speed, naming=entrant == OURS) for speed in FLEETS[cell.fleet]]
    dispatcher = named(entrant).make(engines, seed, parameters)
    fleet = Fleet(engines, dispatcher, WORKLOADS[cell.workload](seed, rate, duration))
    return fleet.run(), engines, fleet.now


def run(
    cell: Cell,
    entrant: str,
    parameters: Parameters,
    *,
    rate: float,
    duration: float,
    seed: int,
    cost: StepCost | None = None,
) -> Result:
    """One run. `rate` is in arrivals per second (of conversations where there are such), of the whole fleet."""
    cost = cost or fitted()
    fates, engines, end = simulate(cell, entrant, parameters, rate=rate, duration=duration, seed=seed, cost=cost)
    counted = [fate for fate in fates if fate.arrived >= WARM * duration]
    late = [min(fate.ttft, WORST_S) / fate.request.bounds.ttft_s for fate in counted]
    ttfts = [min(fate.ttft, WORST_S) for fate in counted]
    good = [fate for fate in counted if fate.good]
    return Result(
        lateness=percentile(late, 0.99),
        ttft_s=percentile(ttfts, 0.99),
        goodput=sum(fate.request.answer for fate in good) / ((1 - WARM) * duration),
        good=len(good) / max(1, len(counted)),
        cached=sum(fate.cached for fate in counted) / max(1, sum(fate.request.prompt for fate in counted)),
        busy=math.fsum(engine.busy_s for engine in engines) / len(engines) / end,
        requests=len(counted),
    )
