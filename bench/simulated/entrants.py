"""Who takes part: the scheduler and the rivals' rules, each with the space that its parameters are tuned in."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.rivals.block_cost import BlockCost
from bench.rivals.cache_aware import CacheAware
from bench.rivals.power_of_two import PowerOfTwo
from bench.rivals.round_robin import RoundRobin
from bench.rivals.rule import Routed, Rule
from bench.rivals.weighted import Weighted
from bench.simulated.engine import Engine
from bench.simulated.fleet import Dispatcher
from bench.simulated.scheduler import Scheduled
from scheduler.policy import PlacementWeights, Policy

Parameters = Mapping[str, Any]
Choices = Mapping[str, Sequence[Any]]
OURS = "llmos"


@dataclass(frozen=True, slots=True)
class Entrant:
    """One that routes. Its defaults are the first trial of its tuning, the others are drawn from `choices`."""

    name: str
    make: Callable[[Sequence[Engine], int, Parameters], Dispatcher]
    """Given the engines, a seed and parameters."""
    choices: Choices

    def trials(self, count: int) -> list[Parameters]:
        """At most `count` different settings, the defaults first; the same ones every time."""
        rng = random.Random(self.name)
        found: list[Parameters] = [{}]
        for _ in range(20 * count):
            trial = {name: rng.choice(values) for name, values in self.choices.items()}
            if len(found) < count and trial not in found and trial:
                found.append(trial)
        return found


def _rival(rule: Callable[..., Rule]) -> Callable[[Sequence[Engine], int, Parameters], Dispatcher]:
    def make(engines: Sequence[Engine], seed: int, parameters: Parameters) -> Dispatcher:
        return Routed(rule(len(engines), random.Random(f"rule/{seed}"), **parameters))

    return make


def _ours(engines: Sequence[Engine], seed: int, parameters: Parameters) -> Dispatcher:
    weights = replace(PlacementWeights(), **parameters)
    return Scheduled(engines, Policy(weights=weights))


ENTRANTS = (
    Entrant(
        OURS,
        _ours,
        {
            "disturbance": (0.0, 0.02, 0.05, 0.1, 0.2),
            "decode": (0.0, 0.02, 0.1, 0.3),
            "overlap": (0.0, 0.002, 0.05, 0.2),
            "pressure": (0.0, 0.005, 0.05, 0.2),
            "tie_share": (0.0, 0.02, 0.05, 0.1),
        },
    ),
    Entrant("round robin", _rival(RoundRobin), {}),
    Entrant("two choices", _rival(PowerOfTwo), {"tokens": (False, True)}),
    Entrant(
        "cache-aware tree",
        _rival(CacheAware),
        {
            "cache_threshold": (0.1, 0.2, 0.3, 0.5, 0.7),
            "balance_abs_threshold": (2, 4, 8, 16, 32),
            "balance_rel_threshold": (1.0, 1.2, 1.5, 2.0, 3.0),
            "tree_blocks": (256, 512, 1024, 2048),
            "least_loaded": (False, True),
        },
    ),
    Entrant(
        "block cost",
        _rival(BlockCost),
        {"overlap_weight": (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), "temperature": (0.0, 0.0, 0.05, 0.1, 0.3)},
    ),
    Entrant(
        "weighted scorers",
        _rival(Weighted),
        {
            "prefix": (1.0, 2.0, 3.0, 4.0),
            "queue": (0.5, 1.0, 2.0, 3.0),
            "kv": (0.0, 1.0, 2.0),
            "active": (0.0, 1.0, 2.0, 3.0),
            "queue_threshold": (1, 2, 5, 10),
            "kv_threshold": (0.6, 0.8, 0.95),
        },
    ),
)


def named(name: str) -> Entrant:
    """An entrant."""
    return next(entrant for entrant in ENTRANTS if entrant.name == name)
