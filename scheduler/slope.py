"""How fast something grows, robustly: the median of the slopes of all pairs of points (Theil 1950, Sen 1968).

Up to 29 % of the points may be arbitrarily wrong without moving it far. Sen's confidence bound, from the normal
approximation of Kendall's statistic, tells growth from noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 3.09
"""One-sided 99.9 %."""


@dataclass(frozen=True, slots=True)
class Slope:
    """Growth per unit of the first coordinate."""

    median: float
    lowest: float
    """What it exceeds with 99.9 % confidence, if the noise of the points is independent."""

    @property
    def certain(self) -> float:
        """The median if growth is certain; else 0."""
        return self.median if self.lowest > 0 else 0.0


def theil_sen(points: Sequence[tuple[float, float]]) -> Slope:
    """Slope of (x, y) points; without two different x it is 0. Quadratic in their number."""
    slopes = sorted(
        (y2 - y1) / (x2 - x1) for n, (x1, y1) in enumerate(points) for x2, y2 in points[n + 1 :] if x2 != x1
    )
    if not slopes:
        return Slope(0.0, 0.0)
    count, pairs = len(points), len(slopes)
    spread = _Z * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    below = int((pairs - spread) / 2)
    lowest = slopes[below] if pairs > spread else -math.inf
    middle = pairs // 2
    median = slopes[middle] if pairs % 2 else (slopes[middle - 1] + slopes[middle]) / 2
    return Slope(median, lowest)
