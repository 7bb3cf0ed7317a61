"""How long each stage may take: learned from what finished spans took, per model, worker and load. Pure.

A bound is a high quantile of what was seen times a margin. The quantile is split-conformal: of n observations the one
of rank ceil((n + 1)(1 - MISS_RATE)), which a next one exceeds in a share `MISS_RATE` of cases if they are alike; too
few observations have no such rank, and the prior stands in for the rest. As times drift, the margin moves with every
observation so that the stated share holds in the long run all the same (adaptive conformal inference, Gibbs and Candès
2021). docs/deadlines.md tells it with its parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median, median_low
from typing import Literal

Stage = Literal["queue", "prefill", "decode", "step"]

MISS_RATE = 0.001
"""Share of what goes well that lies above its bound all the same."""
_GROWTH = math.log(1.1)
"""Buckets of a sketch grow by a tenth: quantiles are right to 5 %."""
_LEAST_S = 1e-5
_BUCKETS = 240
_HALF_LIFE_S = 120.0
"""What was seen halves in weight in this time."""
_RECENT_S = 2.0
"""The same for how slow a worker is now."""
_USUAL_S = 300.0
"""The same for how slow it usually is."""
_KNOWN = 64.0
"""Observations after which that is known."""
_HEAVY = 1e12
_MARGIN_STEP = 0.3
_MOST_MARGIN = 8.0
_REFRESH, _FEW = 16, 32.0
_SCARCE = 1.0
"""How far a bound of few observations lies above the largest of them: so many times it, more."""
_OWN = 32.0
"""Observations of its own after which a worker is judged by them alone."""
_LATE_LEAST = 32.0
"""Observations before which nothing counts as late."""
_LATE_FLOOR_S = 0.2
"""Nothing is late sooner: a second attempt would gain nothing that anybody notices."""
_COMPARED = 4.0
"""Recent observations without which a worker is not compared with others."""


@dataclass(frozen=True, slots=True)
class StageRule:
    """What is known of a stage before anything was seen."""

    prior: float
    """Upper bound to begin with: seconds, or, of a prefill, times what is expected of it."""
    prior_weight: float
    """Observations that the prior weighs as much as."""
    floor_s: float
    """No bound is shorter: a busy machine pauses now and then."""
    times: float = 1.0
    """The bound is so many times the quantile."""
    miss_rate: float = MISS_RATE
    """Share of what goes well that lies above the quantile."""
    late_share: float = 0.0
    """Share of what goes well that is called late, long before it counts as stalled; 0: none."""


RULES: dict[Stage, StageRule] = {
    "queue": StageRule(prior=60.0, prior_weight=16.0, floor_s=5.0),
    "prefill": StageRule(prior=6.0, prior_weight=8.0, floor_s=1.5, miss_rate=0.01, late_share=0.05),
    "decode": StageRule(prior=5.0, prior_weight=8.0, floor_s=1.0),
    "step": StageRule(prior=2.0, prior_weight=4.0, floor_s=2.0, times=5.0, miss_rate=0.01),
}
"""Prefills are measured in times of what `timing.py` expects, so that short and long prompts have one sketch."""


class Sketch:
    """Quantiles of positive numbers within 5 %; what was seen halves in weight every `half_life_s`.

    Weights grow with time instead of shrinking (forward decay, Cormode et al. 2009): adding touches one bucket.
    """

    __slots__ = ("_counts", "_half_life_s", "_origin", "_total")

    def __init__(self, half_life_s: float = _HALF_LIFE_S) -> None:
        self._half_life_s = half_life_s
        self._counts: dict[int, float] = {}
        self._total = 0.0
        self._origin: float | None = None

    def add(self, value: float, now: float) -> None:
        """Count a number that was seen at `now`."""
        weight = self._weight(now)
        bucket = min(_BUCKETS, 1 + int(math.log(value / _LEAST_S) / _GROWTH)) if value > _LEAST_S else 0
        self._counts[bucket] = self._counts.get(bucket, 0.0) + weight
        self._total += weight

    def count(self, now: float) -> float:
        """Observations, older ones as fractions."""
        weight = self._weight(now)  # which may make light of the total
        return self._total / weight if self._total else 0.0

    def quantile(self, share: float) -> float:
        """The upper edge of the bucket below which this share lies; 0 if nothing was seen."""
        rank, seen, last = share * self._total, 0.0, 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            last = bucket
            if seen >= rank:
                break
        return _LEAST_S * math.exp(last * _GROWTH) if self._total else 0.0

    def _weight(self, now: float) -> float:
        if self._origin is None:
            self._origin = now
        weight = math.exp2(min(900.0, (now - self._origin) / self._half_life_s))
        if weight > _HEAVY:
            kept = {bucket: count / weight for bucket, count in self._counts.items()}
            self._counts = {bucket: count for bucket, count in kept.items() if count > 1e-9}
            self._total, self._origin, weight = sum(self._counts.values()), now, 1.0
        return weight


class StageTimes:
    """What one stage takes for one model at one load, on one worker or on all of them."""

    __slots__ = ("_fresh", "_raw", "_rule", "late", "margin", "sketch")

    def __init__(self, rule: StageRule) -> None:
        self._rule = rule
        self._raw = rule.prior
        self._fresh = 0
        self.sketch = Sketch()
        self.late = math.inf
        """What takes longer is late; infinite while too little was seen."""
        self.margin = 1.0
        """Moves so that the stated share of misses holds while times drift."""

    def observe(self, value: float, now: float) -> None:
        """It took so long."""
        missed = value > self._raw * self.margin
        step = _MARGIN_STEP * (float(missed) - self._rule.miss_rate)
        self.margin = min(_MOST_MARGIN, max(1.0, self.margin * math.exp(step)))
        self.sketch.add(value, now)
        self._fresh += 1
        # A quantile costs more than an observation: looked up again only where it may have moved.
        if missed or self._fresh >= _REFRESH or self.sketch.count(now) < _FEW:
            self._raw, self._fresh = self._quantile(now), 0
            if self._rule.late_share:
                self.late = self._late(now)

    def upper(self) -> float:
        """What all but the stated share lie below."""
        return self._raw * self.margin

    def _late(self, now: float) -> float:
        count = self.sketch.count(now)
        rank = math.ceil((count + 1) * (1 - self._rule.late_share))
        return self.sketch.quantile(min(1.0, rank / count)) if count >= _LATE_LEAST else math.inf

    def _quantile(self, now: float) -> float:
        rule, count = self._rule, self.sketch.count(now)
        rank = math.ceil((count + 1) * (1 - rule.miss_rate))
        found = self.sketch.quantile(min(1.0, rank / count))
        # Too few for the rank: the largest one seen is not enough, and the prior counts for those that lack.
        found *= 1.0 + _SCARCE * max(0.0, 1.0 - (count + 1) * rule.miss_rate)
        trust = count / (count + rule.prior_weight)
        return max(found, (1.0 - trust) * rule.prior + trust * found)


Key = tuple[Stage, str, str, int]
"""Stage, model, worker (empty: all of them), load bucket."""


class Deadlines:
    """Everything learned of stages in one reign. Keys of workers that are gone are forgotten with `forget`."""

    def __init__(self) -> None:
        self._times: dict[Key, StageTimes] = {}
        self._typical: dict[tuple[Stage, str, int], float] = {}
        """What is late on the median worker, by stage, model and load."""
        self._recent: dict[tuple[str, str], Sketch] = {}
        """How slow a worker is with a model now: what it took over what is expected of any worker."""

        self._usual: dict[tuple[str, str], Sketch] = {}
        """The same over a long time."""

    def observe(self, stage: Stage, model: str, worker: str, load: int, value: float, now: float) -> None:
        """A stage, or a part of it, went well and took so long (a prefill: so many times what was expected)."""
        bucket = _bucket(stage, load)
        for name in (worker, "") if worker else ("",):
            self._of(stage, model, name, bucket).observe(value, now)

    def bound_s(self, stage: Stage, model: str, worker: str, load: int, now: float, expected_s: float = 1.0) -> float:
        """Seconds after which it counts as stalled. `expected_s` scales the bound of a prefill."""
        rule, bucket = RULES[stage], _bucket(stage, load)
        everywhere = self._of(stage, model, "", bucket).upper()
        own = self._times.get((stage, model, worker, bucket))
        seconds = everywhere
        if own is not None and worker:
            # With few of its own, what the others showed stands in for the rest, not the prior.
            known = own.sketch.count(now) >= _OWN
            seconds = own.upper() if known else max(everywhere, own.sketch.quantile(1.0))
        return max(rule.floor_s, rule.times * seconds * expected_s)

    def late_s(self, stage: Stage, model: str, worker: str, load: int, expected_s: float = 1.0) -> float:
        """Seconds after which it is late: most take less on its own worker, or on the median worker, whichever is less.
        Infinite: not known."""
        bucket = _bucket(stage, load)
        own = self._times.get((stage, model, worker, bucket))
        usual = self._typical.get((stage, model, bucket))
        if usual is None:
            everywhere = self._times.get((stage, model, "", bucket))
            usual = everywhere.late if everywhere is not None else math.inf
        if own is not None:
            usual = min(usual, own.late)
        return max(_LATE_FLOOR_S, usual * expected_s) if usual < math.inf else math.inf

    def typify(self) -> None:
        """Look up what is late on the median worker; about twice a second. One that is often slow must not make its own
        slowness, or that of all together, the measure."""
        late: dict[tuple[Stage, str, int], list[float]] = {}
        for (stage, model, worker, bucket), times in self._times.items():
            if worker and times.late < math.inf:
                late.setdefault((stage, model, bucket), []).append(times.late)
        self._typical = {key: median_low(found) for key, found in late.items()}

    def quantile(self, stage: Stage, model: str, worker: str, load: int, share: float) -> float:
        """What this share of a worker's stages take; 0: nothing was seen."""
        known = self._times.get((stage, model, worker, _bucket(stage, load)))
        return known.sketch.quantile(share) if known is not None else 0.0

    def compare(self, model: str, worker: str, ratio: float, now: float) -> None:
        """A worker took `ratio` times what any worker is expected to take."""
        recent = self._recent.get((model, worker))
        if recent is None:
            recent = self._recent[model, worker] = Sketch(_RECENT_S)
            self._usual[model, worker] = Sketch(_USUAL_S)
        recent.add(ratio, now)
        self._usual[model, worker].add(ratio, now)

    def slowness(self, model: str, workers: Iterable[str], now: float) -> dict[str, float]:
        """How many times as slow as the median of its peers each worker is now; of those that can be told."""
        known: dict[str, float] = {}
        for worker in workers:
            recent = self._recent.get((model, worker))
            if recent is not None and recent.count(now) >= _COMPARED:
                known[worker] = recent.quantile(0.5)
        return {
            worker: own / median(other for peer, other in known.items() if peer != worker)
            for worker, own in known.items()
            if len(known) > 1
        }

    def slow(self, least: float, now: float) -> list[tuple[str, float, bool]]:
        """Workers that are `least` times as slow as their peers and, if that is known, nearly so as themselves:
        (worker, times, known). A worker of a slower kind is not out of order."""
        found = []
        for model in {model for model, _ in self._recent}:
            there = [worker for name, worker in self._recent if name == model]
            for worker, ratio in self.slowness(model, there, now).items():
                usual = self._usual[model, worker]
                known = usual.count(now) >= _KNOWN
                own = self._recent[model, worker].quantile(0.5) / usual.quantile(0.5)
                if ratio >= least and (not known or own >= 0.75 * least):
                    found.append((worker, ratio, known))
        return sorted(found)

    def tails(self, share: float) -> dict[tuple[str, str], tuple[float, float]]:
        """By worker and model: what this share of prefills, as times what was expected, and of gaps stays below, at the
        load at which it is worst."""
        found: dict[tuple[str, str], tuple[float, float]] = {}
        for (stage, model, worker, _), times in self._times.items():
            if worker and stage in ("prefill", "decode"):
                prefill, gap = found.get((worker, model), (1.0, 0.0))
                value = times.sketch.quantile(share)
                found[worker, model] = (max(prefill, value), gap) if stage == "prefill" else (prefill, max(gap, value))
        return found

    def forget(self, worker: str) -> None:
        """A worker is gone for good."""
        self._times = {key: times for key, times in self._times.items() if key[2] != worker}
        self._recent = {key: sketch for key, sketch in self._recent.items() if key[1] != worker}
        self._usual = {key: sketch for key, sketch in self._usual.items() if key[1] != worker}

    def _of(self, stage: Stage, model: str, worker: str, bucket: int) -> StageTimes:
        key = (stage, model, worker, bucket)
        found = self._times.get(key)
        if found is None:
            found = self._times[key] = StageTimes(RULES[stage])
        return found


def load_bucket(load: int) -> int:
    """Sequences that run beside it, in powers of four: bounds of a busy worker are its own."""
    return 0 if load < 4 else 1 if load < 16 else 2 if load < 64 else 3


def _bucket(stage: Stage, load: int) -> int:
    """What a prefill is expected to take knows of the load already."""
    return 0 if stage == "prefill" else load_bucket(load)
