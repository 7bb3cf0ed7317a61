"""Bounds of stages: what share lies above them, how soon they are learned, how they forget; on virtual time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from llmos.telemetry import REQUEST_ID, Telemetry
from scheduler.commands import Progress
from scheduler.deadlines import MISS_RATE, RULES, Deadlines, Sketch, Stage
from scheduler.events import AttemptStalled
from scheduler.span_watch import LOOK_S, SpanWatch
from scheduler.spans import ATTEMPT, EXPECTED_S, MODEL, TERM, WORKER
from tests.fakes.clock import ManualClock


def test_quantiles_are_right_to_a_tenth() -> None:
    sketch = Sketch()
    rng = random.Random(5)
    seen = sorted(rng.lognormvariate(-3, 1) for _ in range(2000))
    for value in seen:
        sketch.add(value, 0.0)
    for share in (0.1, 0.5, 0.9, 0.99):
        assert seen[int(share * len(seen))] <= 1.01 * sketch.quantile(share) <= 1.13 * seen[int(share * len(seen))]


def test_sketch_forgets() -> None:
    sketch = Sketch(half_life_s=10.0)
    for _ in range(1000):
        sketch.add(5.0, 0.0)
    assert sketch.count(100.0) < 1.0
    for _ in range(10):
        sketch.add(0.1, 100.0)
    assert sketch.quantile(0.5) < 0.12
    sketch.add(0.1, 1e9)
    assert sketch.count(1e9) == pytest.approx(1.0)


def _steady(rng: random.Random, _: int) -> float:
    return rng.lognormvariate(math.log(2.0), 0.3)


def _drifting(rng: random.Random, number: int) -> float:
    return rng.lognormvariate(math.log(2.0), 0.3) * (1.0 + number / 5000)


def _bursty(rng: random.Random, _: int) -> float:
    return rng.choice((2.0, 2.0, 2.0, 9.0)) * rng.uniform(0.8, 1.2)


@pytest.mark.parametrize("draw", [_steady, _drifting, _bursty])
def test_stated_share_lies_above_the_bound(draw: Callable[[random.Random, int], float]) -> None:
    """Whatever the distribution, drift included: at most a few times the stated rate, and the bound is no refuge."""
    rng, deadlines, missed, bound = random.Random(11), Deadlines(), 0, 0.0
    for number in range(20_000):
        now = number / 20
        seconds = draw(rng, number)
        if number > 200:
            bound = deadlines.bound_s("decode", "m", "w", 2, now)
            missed += seconds > bound
        deadlines.observe("decode", "m", "w", 2, seconds, now)
    assert missed <= 3 * MISS_RATE * 20_000
    assert bound < 8 * sum(draw(rng, 20_000) for _ in range(200)) / 200


def test_cold_bound_is_the_prior_and_is_soon_learned() -> None:
    deadlines = Deadlines()
    rule = RULES["decode"]
    assert deadlines.bound_s("decode", "m", "w", 1, 0.0) == rule.prior
    for number in range(64):
        deadlines.observe("decode", "m", "w", 1, 0.05, number / 10)
    assert deadlines.bound_s("decode", "m", "w", 1, 6.4) == rule.floor_s
    fresh = deadlines.bound_s("decode", "m", "new", 1, 6.4)
    assert fresh == rule.floor_s, "a new worker begins with what the others showed"
    assert deadlines.bound_s("decode", "m", "w", 100, 6.4) == rule.prior, "another load is another matter"


def test_prefill_is_bound_in_terms_of_what_is_expected() -> None:
    deadlines = Deadlines()
    for number in range(200):
        deadlines.observe("prefill", "m", "w", 0, 1.2, number / 10)
    short, long = (deadlines.bound_s("prefill", "m", "w", 0, 20.0, expected) for expected in (10.0, 100.0))
    assert long == pytest.approx(10 * short, rel=0.01)


def test_slowness_is_told_from_the_peers_median() -> None:
    deadlines = Deadlines()
    for number in range(40):
        now = number / 10
        for worker, ratio in (("a", 1.0), ("b", 1.1), ("c", 10.0)):
            deadlines.compare("m", worker, ratio, now)
    slow = deadlines.slowness("m", ("a", "b", "c", "unknown"), 4.0)
    assert slow["c"] == pytest.approx(9.5, rel=0.15)
    assert max(slow["a"], slow["b"]) < 1.2
    assert deadlines.slowness("m", ("a",), 4.0) == {}


def test_late_is_what_one_prefill_in_twenty_is() -> None:
    rng, deadlines, late, before = random.Random(4), Deadlines(), 0, 0.0
    for number in range(5000):
        now, value = number / 20, rng.lognormvariate(0.0, 0.5)
        before = deadlines.late_s("prefill", "m", "w", 2, 10.0)
        assert number >= 32 or before == math.inf, "nothing is late until enough was seen"
        assert number < 64 or before < math.inf
        late += 10.0 * value > before
        deadlines.observe("prefill", "m", "w", 2, value, now)
    assert 0.03 * 5000 <= late <= 0.06 * 5000
    assert before < deadlines.bound_s("prefill", "m", "w", 2, 250.0, 10.0), "well before it counts as stalled"
    assert deadlines.late_s("prefill", "m", "w", 2, 1e-3) == 0.2
    assert deadlines.late_s("decode", "m", "w", 2) == math.inf


def test_a_worker_that_is_often_slow_is_late_by_what_the_others_show() -> None:
    deadlines = Deadlines()
    for number in range(400):
        worker = f"w{number % 4}"
        slow = worker == "w0" and number % 12 == 0
        deadlines.observe("prefill", "m", worker, 0, 20.0 if slow else 1.0, number / 20)
    assert deadlines.quantile("prefill", "m", "w0", 0, 0.95) > 15.0
    deadlines.typify()
    assert deadlines.late_s("prefill", "m", "w0", 0) == deadlines.late_s("prefill", "m", "w1", 0) < 1.2
    assert deadlines.late_s("prefill", "m", "new", 0) < 1.2


def test_workers_that_were_idle_for_long_are_not_compared() -> None:
    deadlines = Deadlines()
    for number in range(40):
        for worker in ("a", "b"):
            deadlines.compare("m", worker, 1.0, number / 10)
    for idle in range(4, 400):
        assert deadlines.slow(4.0, float(idle)) == []
    assert deadlines.slowness("m", ("a", "b"), 400.0) == {}


class Scene:
    """A watch, spans on a clock moved by hand, and how far things are."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.telemetry = Telemetry("scheduler", "s1", clock=self.clock, sample_ratio=0.0)
        self.outputs: dict[str, float] = {}
        self.still: dict[str, float | None] = {}
        self.watch = SpanWatch(self, self.clock)
        self.telemetry.watch(self.watch)

    def output_at(self, request_id: str) -> float:
        return self.outputs.get(request_id, 0.0)

    def still_since(self, worker_id: str) -> float | None:
        return self.still.get(worker_id)

    def load(self, worker_id: str) -> int:
        return 1

    def open(self, stage: str, request_id: str = "r", **more: float) -> object:
        about = {REQUEST_ID: request_id, MODEL: "m", WORKER: "w", TERM: 3, ATTEMPT: 1, **more}
        return self.telemetry.start(stage, attributes=about)

    def passes(self, seconds: float) -> list[tuple[str, str]]:
        """Look as often as the scheduler does."""
        told = []
        for _ in range(round(seconds / LOOK_S)):
            self.clock.advance(LOOK_S)
            events = list(self.watch.look())
            told += [(one.stage if isinstance(one, AttemptStalled) else "late", one.request_id) for one in events]
        return told

    def learn(self, stage: Stage, value: float = 0.05) -> None:
        for _ in range(100):
            self.watch.deadlines.observe(stage, "m", "w", 1, value, self.clock.monotonic())


def test_open_decode_is_told_once_its_bound_passes_without_progress() -> None:
    scene = Scene()
    scene.learn("decode")
    scene.open("decode")
    scene.clock.advance(0.5)
    scene.outputs["r"] = scene.clock.monotonic()
    assert scene.passes(0.9) == []
    assert scene.passes(0.2) == [("decode", "r")]
    assert ("decode", "r") in scene.passes(1.0), "it is told again while it lasts"


def test_late_prefill_is_told_before_it_stalls() -> None:
    scene = Scene()
    scene.learn("prefill", 1.0)
    scene.open("prefill", **{EXPECTED_S: 1.0})
    assert scene.passes(1.0) == []
    assert set(scene.passes(0.4)) == {("late", "r")}
    assert ("late", "r") not in scene.passes(20.0)[-3:], "then it stalls"


def test_what_is_given_up_as_late_has_taken_that_long_at_least() -> None:
    scene = Scene()
    span = scene.open("prefill", **{EXPECTED_S: 0.1})
    scene.clock.advance(1.0)
    scene.telemetry.finish(span)  # type: ignore[arg-type]
    assert scene.watch.deadlines.quantile("prefill", "m", "w", 0, 0.5) == pytest.approx(10.0, rel=0.1)


def test_finished_spans_are_watched_no_more_and_teach() -> None:
    scene = Scene()
    for number in range(40):
        span = scene.open("prefill", f"r{number}", **{EXPECTED_S: 0.1})
        scene.clock.advance(0.1)
        scene.telemetry.finish(span)  # type: ignore[arg-type]
    assert len(scene.watch) == 0
    assert scene.passes(30.0) == []
    assert scene.watch.deadlines.quantile("prefill", "m", "w", 0, 0.5) == pytest.approx(1.0, rel=0.1)


def test_what_failed_teaches_nothing() -> None:
    scene = Scene()
    span = scene.open("prefill", **{EXPECTED_S: 0.1})
    scene.clock.advance(50)
    scene.telemetry.finish(span, "worker lost")  # type: ignore[arg-type]
    assert scene.watch.deadlines.quantile("prefill", "m", "w", 0, 0.5) == 0.0


def test_engine_that_stands_still_is_told_by_one_of_its_spans() -> None:
    scene = Scene()
    scene.learn("step")
    scene.open("prefill", "r1", **{EXPECTED_S: 60.0})
    scene.open("prefill", "r2", **{EXPECTED_S: 60.0})
    scene.still["w"] = scene.clock.monotonic()
    assert scene.passes(1.9) == []
    assert scene.passes(0.3) == [("step", "r1")]
    scene.still["w"] = None
    assert scene.passes(1.0) == []


def test_own_pause_is_nobodys_stall() -> None:
    scene = Scene()
    scene.learn("decode")
    scene.open("decode")
    scene.passes(0.2)
    scene.clock.advance(10.0)
    assert list(scene.watch.look()) == []
    assert scene.passes(0.9) == []
    assert scene.passes(0.3) == [("decode", "r")]


def test_progress_teaches_gaps_and_steps() -> None:
    scene = Scene()
    for _ in range(50):
        scene.clock.advance(0.1)
        scene.watch.progressed(Progress("r", "w", "m", 0.1, 0.1, 0.05, 1))
    deadlines, now = scene.watch.deadlines, scene.clock.monotonic()
    assert deadlines.quantile("decode", "m", "w", 1, 0.5) == pytest.approx(0.1, rel=0.1)
    assert deadlines.bound_s("step", "m", "w", 1, now) == RULES["step"].floor_s
