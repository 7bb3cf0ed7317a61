"""Requests as clients send them, and what has become of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a client expects; who gets it counts towards goodput."""

    ttft_s: float
    """Seconds to the first token."""
    gap_s: float
    """Mean seconds between tokens after that."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request. Routers may know all but `answer`."""

    id: str
    tenant: str
    prompt: int
    """Tokens."""
    hashes: Sequence[int]
    """One per full block of 64 prompt tokens; equal hashes have equal tokens up to the block's end."""
    answer: int
    """Tokens that it will get."""
    max_tokens: int
    """Most tokens that it may get."""
    bounds: Bounds
    interactive: bool = True
    """Class: interactive, else standard."""


@dataclass(slots=True)
class Fate:
    """What has become of a request. Times are those at the router."""

    request: Request
    arrived: float
    first: float = math.inf
    """Time of the first token; infinite: there was none."""
    ended: float = math.inf
    cached: int = 0
    """Prompt tokens found in a cache."""
    worker: int = -1

    @property
    def ttft(self) -> float:
        """Seconds; infinite if it was rejected."""
        return self.first - self.arrived

    @property
    def gap(self) -> float:
        """Mean seconds between tokens."""
        return (self.ended - self.first) / max(1, self.request.answer - 1)

    @property
    def good(self) -> bool:
        """Whether it met its bounds."""
        bounds = self.request.bounds
        return self.ttft <= bounds.ttft_s and self.gap <= bounds.gap_s


class Workload(Protocol):
    """Decides who asks what and when; the same for everybody who serves it, from its seed."""

    def arrivals(self) -> Iterable[tuple[float, Request]]:
        """Requests whose time does not depend on how others fare, in order of time."""
        ...

    def after(self, fate: Fate, now: float) -> tuple[float, Request] | None:
        """What follows on a request that has just ended, and when."""
        ...
