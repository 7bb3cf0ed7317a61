"""The simulation of the routing benchmark: deterministic, complete, and its rows say what was found."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from bench import routing
from bench.simulated import settings
from bench.simulated.cells import CELLS, Cell, Result, run, simulate
from bench.simulated.cost import StepCost, fitted
from bench.simulated.entrants import ENTRANTS, OURS
from bench.simulated.fit import Sample, fit, quickest

pytestmark = pytest.mark.torch

SMALL = Cell("shared prompts", "4 equal")
COST = fitted()
RESULT = Result(1.0, 1.0, 100.0, 1.0, 0.5, 0.8, 10)


@pytest.mark.parametrize("entrant", [entrant.name for entrant in ENTRANTS])
def test_the_same_seed_gives_the_same_result(entrant: str) -> None:
    first, second = (run(SMALL, entrant, {}, rate=2.0, duration=12.0, seed=5, cost=COST) for _ in range(2))
    assert first == second
    assert run(SMALL, entrant, {}, rate=2.0, duration=12.0, seed=6, cost=COST) != first


@pytest.mark.parametrize("workload", ["shared prompts", "chat", "documents", "bursty tenants"])
@pytest.mark.parametrize("entrant", [OURS, "block cost"])
def test_everybody_is_served_at_a_low_rate(workload: str, entrant: str) -> None:
    cell = Cell(workload, "8 mixed")
    fates, engines, _ = simulate(cell, entrant, {}, rate=1.0, duration=15.0, seed=3, cost=COST)
    assert len(fates) > 5
    assert all(fate.arrived < fate.first <= fate.ended < math.inf for fate in fates)
    assert all(len(engine) == 0 and engine.used == 0 for engine in engines)


def test_workloads_do_not_depend_on_who_serves_them() -> None:
    sides = [simulate(SMALL, name, {}, rate=2.0, duration=10.0, seed=4, cost=COST)[0] for name in (OURS, "two choices")]
    asked = [[(fate.request, fate.arrived) for fate in side] for side in sides]
    assert asked[0] == asked[1]


def test_rows_compare_with_the_best_rival_of_each_figure() -> None:
    ours = [replace(RESULT, lateness=0.7, goodput=120.0)] * 3
    late = [replace(RESULT, lateness=1.0, goodput=90.0)] * 3
    slow = [replace(RESULT, lateness=2.0, goodput=110.0)] * 3
    found = {SMALL: {OURS: ours, "late": late, "slow": slow}}
    ttft, goodput, *counts = routing.compare(found)
    assert ttft.case.endswith("late") and (ttft.ratio, ttft.ok) == (0.7, True)
    assert goodput.case.endswith("slow") and goodput.ratio == pytest.approx(1.091) and goodput.ok
    assert [row.ours for row in counts] == [1, 0, 1]
    worse = {SMALL: {OURS: [replace(RESULT, lateness=1.03, goodput=97.0)], "late": [RESULT]}}
    assert [row.ok for row in routing.compare(worse)] == [False, False, True, True, False]


def test_settings_are_there_for_every_cell_and_name_real_parameters() -> None:
    stored = settings.stored()
    for cell in CELLS:
        assert stored[cell].rate > 0
        for entrant in ENTRANTS:
            for name, value in stored[cell].parameters.get(entrant.name, {}).items():
                assert value in entrant.choices[name]


def test_trials_begin_with_the_defaults_and_differ() -> None:
    for entrant in ENTRANTS:
        trials = entrant.trials(8)
        assert trials[0] == {} and trials == entrant.trials(8)
        assert len({tuple(sorted(trial.items())) for trial in trials}) == len(trials)


def test_the_fit_finds_the_coefficients_that_made_the_samples() -> None:
    true = StepCost(0.01, 0.002, 1e-6, 0.0, 0.001, 2e-6)
    kinds = [(n, 100 * n, 0, 0) for n in (1, 2, 8, 32)] + [
        (n, 50 * n, 128, first) for n in (0, 4) for first in (8256, 90176)
    ]
    kinds += [(0, 0, 16, 136), (4, 4000, 0, 0), (16, 600, 64, 2080)]
    measured = [Sample(*kind, seconds=true.seconds(*kind) * share) for kind in kinds for share in (1.5, 1.0)]
    found = fit(quickest(measured))
    assert found.median_error < 1e-6
    assert found.cost.seconds(8, 900, 128, 50_000) == pytest.approx(true.seconds(8, 900, 128, 50_000), rel=1e-3)
