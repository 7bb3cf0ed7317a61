"""How long workers take, learned from noisy observations. Virtual time, seeded noise."""

from __future__ import annotations

import random
import statistics

from scheduler.timing import FleetTimes, Times


def truth(own: int, ahead: int, decoding: int, slowness: float) -> float:
    """A worker's first token: chunks of a prefill share their steps with what decodes."""
    return slowness * (0.008 + 0.0005 * (own + ahead) + 0.0004 * decoding + 1e-5 * decoding * (own + ahead))


class Bench:
    """Workers of one model, with requests of mixed sizes."""

    def __init__(self, slowness: list[float], seed: int) -> None:
        fleet = FleetTimes()
        self.slowness = slowness
        self.times = [Times(fleet).first_token for _ in slowness]
        self.rng = random.Random(seed)
        self.now = 0.0

    def request(self, worker: int) -> tuple[int, int, int]:
        return self.rng.choice([20, 200, 1000]), self.rng.choice([0, 0, 300, 2000]), self.rng.randrange(40)

    def serve(self, worker: int, spread: float = 0.2) -> tuple[float, bool]:
        """One request: relative error of the mean, and whether the upper bound was passed."""
        self.now += 0.1
        met = self.request(worker)
        expected = truth(*met, self.slowness[worker])
        seconds = expected * self.rng.lognormvariate(0, spread)
        mean, upper = self.times[worker].bounds(*met)
        self.times[worker].took(*met, seconds, self.now)
        return abs(mean - expected) / expected, seconds > upper


def test_speeds_of_a_mixed_fleet_are_learned() -> None:
    bench = Bench([1.0, 2.0, 4.0, 1.0], seed=1)
    for number in range(800):
        bench.serve(number % 4)
    errors = [bench.serve(number % 4)[0] for number in range(800)]
    assert statistics.median(errors) < 0.1
    assert sorted(errors)[int(0.95 * len(errors))] < 0.35


def test_the_margin_keeps_its_word_whatever_the_noise() -> None:
    for spread in (0.05, 0.5, 1.0):
        bench = Bench([1.0, 3.0], seed=2)
        for number in range(500):
            bench.serve(number % 2, spread)
        missed = [bench.serve(number % 2, spread)[1] for number in range(2000)]
        assert 0.03 <= statistics.mean(missed) <= 0.07


def test_a_worker_that_slows_down_is_believed_soon() -> None:
    bench = Bench([1.0, 1.0], seed=3)
    for number in range(400):
        bench.serve(number % 2)
    bench.slowness[1] = 10.0
    for _ in range(60):
        bench.serve(1)
    errors = [bench.serve(1)[0] for _ in range(20)]
    assert statistics.median(errors) < 0.4


def test_one_hiccup_changes_little() -> None:
    bench = Bench([1.0], seed=4)
    for _ in range(200):
        bench.serve(0)
    before = bench.times[0].seconds(200, 0, 10)
    bench.times[0].took(200, 0, 10, 60.0, bench.now)
    assert bench.times[0].seconds(200, 0, 10) < 1.3 * before


def test_a_new_worker_begins_with_what_the_others_know() -> None:
    fleet, rng = FleetTimes(), random.Random(5)
    veteran = Times(fleet).first_token
    for number in range(300):
        met = (rng.choice([20, 200, 1000]), rng.choice([0, 500]), rng.randrange(30))
        veteran.took(*met, truth(*met, 3.0), float(number))
    novice = Times(fleet).first_token
    assert abs(novice.seconds(500, 0, 5) - truth(500, 0, 5, 3.0)) < 0.2 * truth(500, 0, 5, 3.0)
    assert novice.margin < 2.0, "the margin is the fleet's too"


def test_slow_times_are_forgotten_without_news() -> None:
    bench = Bench([1.0] * 8, seed=6)
    for number in range(1600):
        bench.serve(number % 8)
    bench.slowness[0] = 8.0
    for _ in range(60):
        bench.serve(0)
    bench.slowness[0] = 1.0
    slow = bench.times[0].seconds(200, 0, 5)
    for number in range(3000):
        bench.serve(1 + number % 7)
    bench.times[0].refresh(bench.now)
    assert bench.times[0].seconds(200, 0, 5) < slow / 3


def test_more_to_do_never_takes_less() -> None:
    fleet, rng = FleetTimes(), random.Random(7)
    times = Times(fleet)
    for number in range(300):
        times.first_token.took(rng.randrange(1000), rng.randrange(100), rng.randrange(9), rng.random(), float(number))
        times.step.took(rng.randrange(30), rng.random() < 0.5, rng.random() / 10, float(number))
        assert min(times.first_token.coefficients) >= 0 and min(times.step.coefficients) >= 0


def test_time_between_tokens_follows_the_load() -> None:
    fleet, rng = FleetTimes(), random.Random(8)
    times = Times(fleet).step
    for number in range(400):
        decoding, prefilling = rng.randrange(1, 33), rng.random() < 0.3
        seconds = (0.01 + 0.0012 * decoding + 0.03 * prefilling) * rng.lognormvariate(0, 0.1)
        times.took(decoding, prefilling, seconds, number / 10)
    assert abs(times.seconds(8, False) - 0.0196) < 0.004
    assert abs(times.seconds(24, True) - 0.0688) < 0.01
