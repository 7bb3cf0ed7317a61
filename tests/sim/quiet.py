"""Telemetry that records nothing: spans decide nothing here, and cost half of a run's time."""

from __future__ import annotations

from typing import Any

from opentelemetry.trace import INVALID_SPAN, Span

from llmos.telemetry import Telemetry


class Quiet(Telemetry):
    """Implements the parts of `Telemetry` that services call."""

    def __init__(self) -> None:
        """No provider, no processors."""

    def now(self) -> int:
        return 0

    def at(self, monotonic_s: float) -> int:
        return 0

    def start(self, name: str, **_: Any) -> Span:
        return INVALID_SPAN

    def finish(self, span: Span, error: str = "", end_ns: int | None = None) -> None:
        pass

    def drain(self, limit: int = 512) -> list[Any]:
        return []

    @property
    def dropped(self) -> int:
        return 0

    def shutdown(self, timeout_s: float) -> None:
        pass
