"""Capacity is never exceeded: random sequences of events, by seeds and by hypothesis.

`python -m tests.unit.scheduler.ledger_machine 100000` runs as many as one likes.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from tests.unit.scheduler.ledger_machine import NAMES, LedgerMachine, run_sequence

SEQUENCES = int(os.environ.get("LLMOS_LEDGER_SEQUENCES", "60"))


class Sequences(RuleBasedStateMachine):
    """Hypothesis picks what happens and every choice within it, and makes a sequence that fails as short as it can."""

    def __init__(self) -> None:
        super().__init__()
        self.choices: list[int] = []
        self.machine = LedgerMachine(lambda bound: self.choices.pop(0) % bound if self.choices else 0)

    @rule(name=st.sampled_from(NAMES), choices=st.lists(st.integers(0, 999), min_size=12, max_size=12))
    def act(self, name: str, choices: list[int]) -> None:
        self.choices = choices
        getattr(self.machine, name)()


@pytest.mark.timeout(max(120, SEQUENCES))
def test_no_random_sequence_gives_a_device_out_twice() -> None:
    found = [run_sequence(seed) for seed in range(SEQUENCES)]
    assert sum(one["loads"] for one in found) > 0
    assert sum(one["unloads"] for one in found) > 0
    assert sum(one["jobs"] for one in found) > 0


def test_no_sequence_that_hypothesis_finds_does() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Sequences,
        settings=settings(
            max_examples=20, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
