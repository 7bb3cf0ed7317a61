"""The cells' rates and the entrants' tuned parameters: found by `python -m bench.routing --tune`, checked in."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.simulated.cells import CELLS, FLEETS, Cell, Result
from bench.simulated.entrants import ENTRANTS, OURS, Entrant, Parameters
from bench.simulated.matches import Match, Players

STORED = Path(__file__).with_name("settings.json")
UTILISATION = 0.85
"""The cells' rates, in shares of what the best rival with its defaults can keep up with."""
TRIALS = 6
"""Settings that are tried for each entrant in each cell."""
TUNING_SEEDS = (101,)
"""Of the runs that settings are chosen by; results come from others."""
REQUESTS = 300
"""Of a tuning run, about."""
LEAST_S = 60.0
"""No run is shorter, whatever the rate."""
_FIRST_RATES = {"shared prompts": 0.8, "chat": 0.15, "documents": 0.15, "bursty tenants": 0.6}
"""Arrivals per second and unit of speed at which the search for the highest rate begins."""
_STEPS = 4
_KEEPS_UP = 0.5
"""Who keeps up serves so large a share within their bounds."""
PER_ARRIVAL = {"shared prompts": 1.0, "chat": 4.0, "documents": 1.0, "bursty tenants": 1.0}
"""Requests that an arrival comes to, about."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What holds in a cell."""

    rate: float
    """Arrivals per second."""
    parameters: dict[str, Parameters]
    """By entrant."""


def duration(cell: Cell, rate: float, requests: int) -> float:
    """Seconds of a run with about so many requests."""
    return max(LEAST_S, requests / rate / PER_ARRIVAL[cell.workload])


def stored(path: Path = STORED) -> dict[Cell, Setting]:
    """What is checked in."""
    found: dict[str, Any] = json.loads(path.read_text())
    return {cell: Setting(**found["cells"][cell.name]) for cell in CELLS}


def tune(players: Players, cells: Sequence[Cell], path: Path = STORED) -> None:
    """Find rates and parameters, and store them; those of other cells stay."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cells": {}}
    rates = _highest_rates(players, cells)
    for cell in cells:
        found["cells"][cell.name] = {"rate": _rounded(UTILISATION * rates[cell]), "parameters": {}}
    rivals = [entrant for entrant in ENTRANTS if entrant.name != OURS]
    path.write_text(json.dumps(found, indent=1) + "\n")
    for cell, name, parameters in _best(players, cells, rivals, found):
        found["cells"][cell.name]["parameters"][name] = parameters
    found["how"] = {
        "utilisation": UTILISATION,
        "trials": TRIALS,
        "seeds": TUNING_SEEDS,
        "ours": "the defaults of scheduler/policy.py in every cell",
    }
    path.write_text(json.dumps(found, indent=1) + "\n")


def tune_ours(players: Players, cells: Sequence[Cell], trials: int = TRIALS) -> list[tuple[float, Parameters]]:
    """Settings of ours by their score over all cells, best first. Nothing is stored: the best become the defaults."""
    ours = next(entrant for entrant in ENTRANTS if entrant.name == OURS)
    settings = stored()
    tried = ours.trials(trials)
    matches = [match for cell in cells for one in tried for match in _matches(cell, OURS, one, settings[cell].rate)]
    results = iter(players.play(matches, "tuning ours"))
    totals = [0.0] * len(tried)
    for _ in cells:
        for number in range(len(tried)):
            totals[number] += statistics.fmean(score(next(results)) for _ in TUNING_SEEDS)
    return sorted(zip((total / len(cells) for total in totals), tried, strict=True), key=lambda one: -one[0])


def score(result: Result) -> float:
    """What tuning maximises: a tenth more goodput is worth as much as a tenth less lateness."""
    return math.log(max(result.goodput, 1e-3)) - math.log(result.lateness)


def _highest_rates(players: Players, cells: Sequence[Cell]) -> dict[Cell, float]:
    """At which the best rival with its defaults keeps up, by bisection in all cells at once."""
    low = dict.fromkeys(cells, 0.0)
    tried = {cell: _FIRST_RATES[cell.workload] * sum(FLEETS[cell.fleet]) for cell in cells}
    high = dict.fromkeys(cells, math.inf)
    names = [entrant.name for entrant in ENTRANTS if entrant.name not in (OURS, "round robin", "two choices")]
    for number in range(_STEPS):
        matches = [
            Match(cell, name, {}, tried[cell], duration(cell, tried[cell], REQUESTS), TUNING_SEEDS[0])
            for cell in cells
            for name in names
        ]
        results = iter(players.play(matches, f"highest rates, step {number + 1} of {_STEPS}"))
        for cell in cells:
            keeps_up = max(next(results).good for _ in names) >= _KEEPS_UP
            (low if keeps_up else high)[cell] = tried[cell]
            tried[cell] = min(2 * tried[cell], (low[cell] + high[cell]) / 2)
    return {cell: low[cell] or tried[cell] for cell in cells}


def _best(
    players: Players, cells: Sequence[Cell], entrants: Sequence[Entrant], found: dict[str, Any]
) -> Iterable[tuple[Cell, str, Parameters]]:
    """The best setting of each entrant in each cell."""
    asked = [
        (cell, entrant.name, parameters)
        for cell in cells
        for entrant in entrants
        for parameters in entrant.trials(TRIALS)
    ]
    matches = [
        match
        for cell, name, parameters in asked
        for match in _matches(cell, name, parameters, found["cells"][cell.name]["rate"])
    ]
    results = iter(players.play(matches, "tuning the rivals"))
    best: dict[tuple[Cell, str], tuple[float, Parameters]] = {}
    for cell, name, parameters in asked:
        reached = statistics.fmean(score(next(results)) for _ in TUNING_SEEDS)
        if (cell, name) not in best or reached > best[cell, name][0]:
            best[cell, name] = reached, parameters
    for (cell, name), (_, parameters) in best.items():
        yield cell, name, parameters


def _matches(cell: Cell, name: str, parameters: Parameters, rate: float) -> list[Match]:
    span = duration(cell, rate, REQUESTS)
    return [Match(cell, name, parameters, rate, span, seed) for seed in TUNING_SEEDS]


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
