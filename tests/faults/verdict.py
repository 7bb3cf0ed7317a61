"""What became of a stream, by comparing each token with the one that it must be. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

STALE = "\x01"
"""What an attempt that is over makes instead of its tokens (see `doubles/engine.py`)."""
_WINDOW = 6


@dataclass(slots=True)
class Counts:
    """The four numbers that must be 0, and what was injected. Tokens, except `injected` and `lost`."""

    injected: int = 0
    """Faults."""
    lost: int = 0
    """Accepted requests without exactly one end, a result or a typed error; or with tokens missing from a result."""
    duplicated: int = 0
    corrupted: int = 0
    stale_accepted: int = 0

    def add(self, other: Counts) -> None:
        """Sum up."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    @property
    def clean(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.lost or self.duplicated or self.corrupted or self.stale_accepted)


def compare(expected: str, got: str) -> Counts:
    """Walk through both. `lost` is 1 if tokens are missing in the middle; what is missing at the end is not judged."""
    found = Counts()
    at = 0
    place = 0
    while place < len(got):
        if at < len(expected) and got[place] == expected[at]:
            place, at = place + 1, at + 1
            continue
        if got[place] == STALE:
            found.stale_accepted += 1
            place, at = place + 1, at + 1
            continue
        window = got[place : place + _WINDOW]
        ahead, behind = expected.find(window, at), expected.rfind(window, 0, at + _WINDOW - 1)
        if len(window) == _WINDOW and ahead >= 0:
            found.lost, at = 1, ahead
        elif len(window) == _WINDOW and behind >= 0:
            found.duplicated += at - behind
            at = behind
        elif at >= len(expected):
            found.duplicated += 1
            place += 1
        else:
            found.corrupted += 1
            place, at = place + 1, at + 1
    return found


def quantile(values: Iterable[float], share: float) -> float:
    """The value below which this share lies; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
