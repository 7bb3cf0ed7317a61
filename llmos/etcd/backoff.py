"""How long to wait before trying again."""

from __future__ import annotations

import random


class Backoff:
    """Exponential back-off with full jitter (Brooker, "Exponential Backoff And Jitter", AWS 2015).

    Not shared: each loop that retries has its own. The randomness is the caller's.
    """

    def __init__(self, rng: random.Random, *, base_s: float = 0.05, cap_s: float = 2.0) -> None:
        self._rng = rng
        self._base_s = base_s
        self._cap_s = cap_s
        self._ceiling_s = base_s

    def next_s(self) -> float:
        """Seconds to wait now: uniform below a ceiling that doubles with every call, up to the cap."""
        ceiling_s = self._ceiling_s
        self._ceiling_s = min(self._cap_s, ceiling_s * 2)
        return self._rng.uniform(0, ceiling_s)

    def reset(self) -> None:
        """Start over: something succeeded."""
        self._ceiling_s = self._base_s
