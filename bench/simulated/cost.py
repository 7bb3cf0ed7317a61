"""Seconds of an engine step, by what it computes: a linear model whose coefficients were fitted to the real engine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FITTED = Path(__file__).with_name("step_cost.json")
"""Coefficients, their error, and how they were measured: `python -m bench.routing --fit` writes it."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds. A step that computes nothing takes no time; every other one has the fixed part."""

    fixed: float
    """Of every step: weights are read once."""
    decode: float
    """Per sequence that gets a token."""
    context: float
    """Per token that these sequences attend to."""
    chunk: float
    """Once if any prompt token is computed."""
    prefill: float
    """Per prompt token."""
    attended: float
    """Per token that a prompt token attends to."""

    def seconds(self, decodes: int, context: int, prefill: int, attended: int) -> float:
        """Of a step. `context` and `attended` are sums over its sequences and prompt tokens."""
        return (
            self.fixed
            + self.decode * decodes
            + self.context * context
            + (self.chunk if prefill else 0.0)
            + self.prefill * prefill
            + self.attended * attended
        )


def fitted(path: Path = FITTED) -> StepCost:
    """The coefficients that are checked in."""
    found: dict[str, Any] = json.loads(path.read_text())
    return StepCost(**found["seconds"])
