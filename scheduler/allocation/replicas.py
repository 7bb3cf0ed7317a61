"""How many replicas of a model ought to be loaded: follows load between a minimum and a maximum, slowly down, pure.

A replica is added when more requests are there than the present ones are meant to run, for a while, and only if it
would be loaded before the queue is gone anyway. One is taken away after a long time without need for it: a mistake
costs a load.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_HORIZON_S = 3.0
"""Rates are averages over about this long."""
_SLACK = 0.7
"""A replica goes only if the others would then be filled no further than this."""
_ENOUGH = 0.9
"""Capacity that is on its way is enough if it takes the arrivals at no more than this share."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What was promised, and how patient to be."""

    least: int
    most: int
    up_s: float
    """Seconds of need before a replica is added."""
    down_s: float
    """Seconds without need before one is taken away; at least twice the load time counts."""
    idle_s: float
    """Seconds without any request before the last one goes, if none need stay."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the model now."""

    waiting: int
    running: int
    per_replica: int
    """Requests that one replica is meant to run at a time; at least 1."""
    loaded: int
    """Replicas that serve."""
    arrivals: int
    """Requests so far, ever growing."""
    departures: int
    """Requests that ended so far, ever growing."""
    load_s: float
    """Seconds until a further replica serves."""

    @property
    def demand(self) -> int:
        """Requests that are here."""
        return self.waiting + self.running


@dataclass(slots=True)
class Replicas:
    """The state between two looks. `look` every half second or so."""

    wanted: int
    looked_at: float | None = None
    arrivals: int = 0
    departures: int = 0
    arriving: float = 0.0
    """Requests per second."""
    leaving: float = 0.0
    """Requests that end per second."""
    each: float = 0.0
    """Requests that one busy replica ends per second; 0: not known."""
    short_since: float | None = None
    ample_since: float | None = None
    most_needed: int = 0
    """The most that was needed since `ample_since`."""
    idle_since: float | None = None

    def look(self, load: Load, bounds: Bounds, now: float) -> int:
        """Take in the load and say how many are wanted from now on."""
        self._measure(load, now)
        self.wanted = min(max(self.wanted, bounds.least), bounds.most)
        self._grow(load, bounds, now)
        self._shrink(load, bounds, now)
        return self.wanted

    def _measure(self, load: Load, now: float) -> None:
        if self.looked_at is not None and now > self.looked_at:
            passed = now - self.looked_at
            weight = 1 - math.exp(-passed / _HORIZON_S)
            self.arriving += weight * ((load.arrivals - self.arrivals) / passed - self.arriving)
            self.leaving += weight * ((load.departures - self.departures) / passed - self.leaving)
        self.looked_at, self.arrivals, self.departures = now, load.arrivals, load.departures
        if load.loaded and load.demand >= load.loaded * load.per_replica:
            self.each = self.leaving / load.loaded

    def _grow(self, load: Load, bounds: Bounds, now: float) -> None:
        needed = min(math.ceil(load.demand / load.per_replica), bounds.most)
        if needed <= self.wanted:
            self.short_since = None
            return
        if self.short_since is None:
            self.short_since = now
        if not self.wanted or (
            now - self.short_since >= bounds.up_s and not self._suffices(load) and not self._drains_first(load)
        ):
            self.wanted, self.short_since = needed, None

    def _suffices(self, load: Load) -> bool:
        """Replicas that are loading will take what comes: the backlog of the meantime is no reason for more."""
        return load.loaded < self.wanted and 0 < self.arriving < _ENOUGH * self.wanted * self.each

    def _drains_first(self, load: Load) -> bool:
        """The present replicas will be done with the excess before another one could help."""
        excess = load.demand - self.wanted * load.per_replica
        net = self.leaving - self.arriving
        return net > 0 and excess / net <= load.load_s

    def _shrink(self, load: Load, bounds: Bounds, now: float) -> None:
        needed = max(math.ceil(load.demand / (_SLACK * load.per_replica)), bounds.least, 1)
        if needed >= self.wanted:
            self.ample_since, self.most_needed = None, 0
        else:
            self.ample_since = now if self.ample_since is None else self.ample_since
            self.most_needed = max(self.most_needed, needed)
            if now - self.ample_since >= max(bounds.down_s, 2 * load.load_s):
                self.wanted, self.ample_since, self.most_needed = self.most_needed, None, 0
        if load.demand or bounds.least:
            self.idle_since = None
        elif self.wanted:
            self.idle_since = now if self.idle_since is None else self.idle_since
            if now - self.idle_since >= bounds.idle_s:
                self.wanted, self.idle_since = 0, None
