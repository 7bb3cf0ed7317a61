"""How long a worker takes, learned from what it took: a mean for comparisons, an upper bound for promises. Pure.

A `Regression` weighs what was seen of one worker, the latest most, against what holds for all workers of the model, so
that a new worker begins with the experience of the others. Coefficients are never negative: more to do never takes less
time. The bound is the mean times a factor that moves with every observation so that, in the long run, the stated share
of observations lies above it, whatever their distribution (adaptive conformal inference, Gibbs and Candès 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

MISS_RATE = 0.05
"""Share of observations that lie above the upper bound."""
FLOOR_S = 1e-4
"""No prediction is shorter."""
_MEMORY = 64.0
"""Observations after which a worker's earlier ones weigh 1/e."""
_FLEET_MEMORY = 512.0
"""The same for what all workers have in common."""
_FLEET_WEIGHT = 16.0
"""Observations of its own that weigh as much with a worker as the fleet's experience."""
_SAME = 2.0
"""Observations of its own after which a worker is believed to be half as different from the others as they say."""
_PRIOR_WEIGHT = 0.5
"""Observations of anybody that weigh as much as the prior."""
_FADE_S = 30.0
"""What a worker showed halves in weight in this time without news: a slow spell is not held against it for ever."""
_SURPRISE = 4.0
"""An observation counts as at most so many times what was expected: a hiccup must not drown a hundred others."""
_DRIFT = 0.3
"""A lasting error of the logarithm beyond this is a change of speed: what was seen before it is soon forgotten."""
_STEP = 0.05
"""How far the logarithm of the bound's factor moves."""
_SWEEPS = 3


@dataclass(frozen=True, slots=True)
class Prior:
    """What to expect before anything was seen: right in its order of magnitude, soon outweighed."""

    coefficients: tuple[float, ...]
    """Seconds per unit of each feature."""
    typical: tuple[float, ...]
    """How large each feature tends to be; the first one is 1."""


class Experience:
    """Observations of all workers of a kind, as weighted sums: the least squares' matrix and right side, by rows."""

    __slots__ = ("_keep", "_sums", "coefficients", "margin")

    def __init__(self, prior: Prior) -> None:
        self._keep = math.exp(-1.0 / _FLEET_MEMORY)
        self._sums = _prior_sums(prior)
        self.coefficients = list(prior.coefficients)
        """Seconds per unit of each feature, never negative. One list, changed in place: workers of which nothing was
        seen look at it."""
        self.margin = 2.0
        """Upper bound over mean, at least 1."""

    def scaled(self, weight: float, slowness: float) -> list[float]:
        """The sums, as if the observations had had this weight together and had taken `slowness` times as long."""
        share = weight / self._sums[0]  # the first feature is 1
        sums = [share * value for value in self._sums]
        size = len(self.coefficients)
        for place in range(size, len(sums), size + 1):
            sums[place] *= slowness
        return sums

    def add(self, row: Sequence[float]) -> None:
        """Take in an observation's products."""
        keep = self._keep
        self._sums = [keep * value + product for value, product in zip(self._sums, row, strict=True)]
        self.coefficients[:] = _solve(self._sums, self.coefficients)


class Regression:
    """What one worker takes: seconds, a sum of coefficients times features. None is negative; the first one is 1."""

    __slots__ = ("_at", "_count", "_fleet", "_off", "_sums", "coefficients", "margin", "seen")

    def __init__(self, fleet: Experience) -> None:
        self._fleet = fleet
        self._count = 0.0
        self._off = 0.0
        self._sums = [0.0] * (len(fleet.coefficients) * (len(fleet.coefficients) + 1))
        self._at = -math.inf
        self.seen = 0
        """Observations so far."""
        self.coefficients = fleet.coefficients
        """Seconds per unit of each feature, never negative; until something was seen, the fleet's own list."""
        self.margin = fleet.margin
        """Upper bound over mean, at least 1."""

    def mean(self, features: Sequence[float]) -> float:
        """Seconds to expect."""
        seconds: float = sum(map(mul, self.coefficients, features))
        return max(FLOOR_S, seconds)

    def predict(self, features: Sequence[float]) -> tuple[float, float]:
        """Seconds to expect, and seconds that in the long run are exceeded in a share `MISS_RATE` of cases."""
        mean = self.mean(features)
        return mean, self.margin * mean

    def observe(self, features: Sequence[float], seconds: float, now: float) -> None:
        """It took so long. `now` is monotonic seconds."""
        mean, upper = self.predict(features)
        # In the long run, steps up and down cancel only where a share MISS_RATE goes up.
        self.margin = max(1.0, self.margin * math.exp(_STEP * ((seconds > upper) - MISS_RATE)))
        self._fleet.margin = max(1.0, self._fleet.margin * math.exp(0.1 * _STEP * ((seconds > upper) - MISS_RATE)))
        self._fade(now)
        counted = min(seconds, _SURPRISE * mean) if self.seen >= _FLEET_WEIGHT else seconds
        # Times scatter the more the longer they are; their inverse as a weight lies between equal weights for seconds,
        # where only long ones count, and equal weights for shares, where only short ones do.
        row = _products(features, counted, 1.0 / mean)
        self._fleet.add(row)
        self._off += (math.log(max(FLOOR_S, seconds) / mean) - self._off) / 8.0
        keep = math.exp(-1.0 / _MEMORY - max(0.0, abs(self._off) - _DRIFT) / 4.0)
        self._sums = [keep * value + product for value, product in zip(self._sums, row, strict=True)]
        self._count = keep * self._count + 1.0
        self.seen += 1
        self._learn()

    def stale(self, now: float) -> bool:
        """Something was seen, but not lately: `refresh` would change the coefficients."""
        return self._count > 0.0 and now - self._at > _FADE_S

    def refresh(self, now: float) -> None:
        """Let what was seen fade where no news came."""
        if self.stale(now):
            self._fade(now)
            self._learn()

    def _fade(self, now: float) -> None:
        idle = now - self._at
        if _FADE_S < idle < math.inf:
            keep = 0.5 ** (idle / _FADE_S)
            self._sums = [keep * value for value in self._sums]
            self._count *= keep
        self._at = now

    def _learn(self) -> None:
        if self._count < 1e-3:
            self._count, self.coefficients = 0.0, self._fleet.coefficients
            return
        # Workers differ by a factor more than in kind, so the fleet's observations count as if made at its speed.
        # Each weighs like one of its own, however long those take.
        expected: float = sum(map(mul, self._fleet.coefficients, self._sums))
        slowness = (self._sums[len(self.coefficients)] * self._count / expected + _SAME) / (self._count + _SAME)
        others = self._fleet.scaled(_FLEET_WEIGHT * self._sums[0] / self._count, slowness)
        self.coefficients = _solve(
            [own + other for own, other in zip(self._sums, others, strict=True)], self.coefficients
        )


def _products(features: Sequence[float], seconds: float, weight: float) -> list[float]:
    row = [*features, seconds]
    return [left * right for left in [weight * value for value in features] for right in row]


def _prior_sums(prior: Prior) -> list[float]:
    """Sums that alone give the prior: as if each feature had been seen by itself at its typical size."""
    size = len(prior.coefficients)
    sums = [0.0] * (size * (size + 1))
    typical = sum(map(mul, prior.coefficients, prior.typical))
    for place, (coefficient, scale) in enumerate(zip(prior.coefficients, prior.typical, strict=True)):
        weight = _PRIOR_WEIGHT * scale * scale / typical
        sums[place * (size + 1) + place] = weight
        sums[place * (size + 1) + size] = weight * coefficient
    return sums


def _solve(sums: Sequence[float], start: Sequence[float]) -> list[float]:
    """Non-negative least squares by coordinate descent from `start`; few sweeps, as every observation adds more."""
    found, size = list(start), len(start)
    for _ in range(_SWEEPS):
        for place in range(size):
            row = sums[place * (size + 1) : (place + 1) * (size + 1)]
            if row[place] > 0.0:
                error = row[size] - sum(map(mul, row, found))
                found[place] = max(0.0, found[place] + error / row[place])
    return found


FIRST_TOKEN = Prior((0.02, 1e-4, 1e-3, 2e-3, 1e-5), (1.0, 256.0, 512.0, 8.0, 4096.0))
"""Of `FirstTokenTime`'s features; a laptop's processor and a model of 0.1 to 1 billion parameters."""
STEP = Prior((0.01, 2e-3, 0.02), (1.0, 8.0, 0.5))
"""Of `StepTime`'s features."""


class FirstTokenTime(Regression):
    """Time from dispatch to the first output.

    Features: 1; the request's uncached tokens; the same with those of attempts ahead of it, which may be half computed;
    sequences that decode; that times the tokens, because every chunk of a prefill shares its step with them.
    """

    __slots__ = ()

    def seconds(self, own: int, ahead: int, decoding: int) -> float:
        """The mean; for placement, which asks often."""
        base, per_own, per_token, per_sequence, per_both = self.coefficients
        tokens = own + ahead
        return base + per_own * own + per_token * tokens + decoding * (per_sequence + per_both * tokens)

    def per_token(self, decoding: int) -> float:
        """The part of it that each token of its own takes."""
        _, per_own, per_token, _, per_both = self.coefficients
        return per_own + per_token + per_both * decoding

    def bounds(self, own: int, ahead: int, decoding: int) -> tuple[float, float]:
        """Mean and upper bound."""
        return self.predict(self._features(own, ahead, decoding))

    def took(self, own: int, ahead: int, decoding: int, seconds: float, now: float) -> None:
        """What it was for a request that met these when it was dispatched."""
        self.observe(self._features(own, ahead, decoding), seconds, now)

    @staticmethod
    def _features(own: int, ahead: int, decoding: int) -> tuple[float, ...]:
        return (1.0, own, own + ahead, decoding, decoding * (own + ahead))


class StepTime(Regression):
    """Time between two frames with output: what a stream waits for its next token.

    Features: 1; sequences that decode; 1 if prompts are being computed beside them.
    """

    __slots__ = ()

    def seconds(self, decoding: int, prefilling: bool) -> float:
        """The mean."""
        base, per_sequence, beside = self.coefficients
        return base + per_sequence * decoding + (beside if prefilling else 0.0)

    def bounds(self, decoding: int, prefilling: bool) -> tuple[float, float]:
        """Mean and upper bound."""
        return self.predict((1.0, decoding, float(prefilling)))

    def took(self, decoding: int, prefilling: bool, seconds: float, now: float) -> None:
        """What it was between two frames."""
        self.observe((1.0, decoding, float(prefilling)), seconds, now)


class Times:
    """What one worker takes for one model."""

    __slots__ = ("first_token", "step")

    def __init__(self, fleet: FleetTimes | None = None) -> None:
        fleet = fleet or FleetTimes()
        self.first_token = FirstTokenTime(fleet.first_token)
        self.step = StepTime(fleet.step)


class FleetTimes:
    """What all workers of one model have in common."""

    __slots__ = ("first_token", "step")

    def __init__(self) -> None:
        self.first_token = Experience(FIRST_TOKEN)
        self.step = Experience(STEP)

    def step_s(self, decoding: int, prefilling: bool) -> float:
        """Seconds that a step takes anywhere, as far as is known."""
        base, per_sequence, beside = self.step.coefficients
        return max(FLOOR_S, base + per_sequence * decoding + (beside if prefilling else 0.0))
