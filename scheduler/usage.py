"""What a worker's processes use of what can run out, over time: minima per stretch, and their robust trend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from llmos.v1 import fleet_pb2
from scheduler.slope import Slope, theil_sen

_POINTS = 40
"""Most points of a series; the stretches double when they are full, so that slow growth is seen too."""
_FIRST_STRETCH_S, _LONGEST_STRETCH_S = 0.5, 60.0
_ENOUGH = 10
"""Points without which nothing is certain."""
Resource: TypeAlias = tuple[fleet_pb2.ResourceKind.ValueType, str]
"""What it is, and of which device if there are several."""


@dataclass(slots=True)
class Series:
    """Use of one resource over time."""

    points: list[tuple[float, float, float]] = field(default_factory=list)
    """Begin of a stretch, attempts ended by then, least use in it."""
    stretch_s: float = _FIRST_STRETCH_S

    def add(self, now: float, ended: int, used: int) -> None:
        """One look."""
        if self.points and now < self.points[-1][0] + self.stretch_s:
            at, by_then, least = self.points[-1]
            self.points[-1] = (at, by_then, min(least, used))
            return
        self.points.append((now, ended, used))
        if len(self.points) > _POINTS:
            if self.stretch_s < _LONGEST_STRETCH_S:
                self.stretch_s *= 2
                pairs = zip(self.points[::2], self.points[1::2], strict=False)
                self.points = [min(pair, key=lambda point: point[2]) for pair in pairs]
            else:
                del self.points[0]

    def per_second(self) -> Slope:
        """Growth with time. The last point is not complete and left out."""
        points = [(at, used) for at, _, used in self.points[:-1]]
        return theil_sen(points) if len(points) >= _ENOUGH else Slope(0.0, 0.0)

    def per_request(self) -> Slope:
        """Growth with the attempts that ended."""
        points = [(ended, used) for _, ended, used in self.points[:-1]]
        return theil_sen(points) if len(points) >= _ENOUGH else Slope(0.0, 0.0)


@dataclass(slots=True)
class Decay:
    """What is known of one worker's use of resources."""

    series: dict[Resource, Series] = field(default_factory=dict)
    uses: dict[Resource, fleet_pb2.ResourceUse] = field(default_factory=dict)
    """The last word on each, with the trend."""
    first: dict[Resource, int] = field(default_factory=dict)
    """The first word on each."""
    models: tuple[tuple[str, int], ...] = ()
    """States of its models when the series began."""
    look_at: float = 0.0
