"""Back-off grows, is capped and starts over."""

from __future__ import annotations

import random

from llmos.etcd.backoff import Backoff


class HighestRoll(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return b


def test_ceiling_doubles_up_to_the_cap_and_starts_over() -> None:
    backoff = Backoff(HighestRoll(), base_s=0.5, cap_s=3.0)
    assert [backoff.next_s() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    backoff.reset()
    assert backoff.next_s() == 0.5


def test_jitter_spreads_clients_that_start_together() -> None:
    waits = {Backoff(random.Random(seed), base_s=1.0).next_s() for seed in range(50)}
    assert len(waits) == 50
    assert all(0 <= wait <= 1.0 for wait in waits)
