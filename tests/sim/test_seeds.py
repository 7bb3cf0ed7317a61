"""A short run of the simulation; `make sim` runs it at length."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.sim.mutants import MUTANTS
from tests.sim.pool import ROOT, run_seeds

SEEDS = range(5000, 5004)


def test_no_invariant_breaks_and_every_seed_gives_one_trace() -> None:
    verdicts = list(run_seeds(SEEDS, jobs=2))
    assert sorted(verdict.seed for verdict in verdicts) == list(SEEDS)
    assert [verdict for verdict in verdicts if verdict.violations] == []
    assert sum(verdict.counts["tokens_delivered"] for verdict in verdicts) > 500
    assert sum(sum(verdict.faults.values()) for verdict in verdicts) > len(SEEDS)


def test_the_command_reports_as_json() -> None:
    command = [sys.executable, "-m", "tests.sim", "--seeds", "2", "--jobs", "2", "--once", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["seeds"] == 2
    assert report["violations"] == 0
    assert report["counts"]["tokens_delivered"] > 0


@pytest.mark.parametrize(("mutant", "first"), [("term-fence-dropped", 4), ("nothing-inherited", 4)])
def test_a_planted_bug_is_found(mutant: str, first: int) -> None:
    """Seeds from `first` on show it."""
    found = list(run_seeds(range(first, first + 4), jobs=2, mutant=mutant, stop=lambda one: bool(one.violations)))
    assert found[-1].violations


def test_every_planted_bug_says_what_it_is() -> None:
    assert len(MUTANTS) >= 20
    assert all(one.what and not one.what.endswith(".") for one in MUTANTS.values())
