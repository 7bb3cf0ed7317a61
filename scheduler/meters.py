"""What is measured of the work: rates over ten seconds, times over a minute. Pure: time is passed in.

The hot path adds to plain integers (`Cell.produced`, `WorkerView.tokens`) and puts one number per frame, and one per
request, into a histogram. Everything else happens once a second, or when somebody looks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from scheduler.requests import LiveRequest, ModelKey
from scheduler.workers import WorkerView

RATE_S = 10
WINDOW_S = 60.0
_SLICES = 6
_FLOOR_S = 1e-4
_GROWTH = math.log(1.1)
"""Buckets of a histogram grow by a tenth: percentiles are right to 5 %."""
_BUCKETS = 180
_IDLE_S = 60.0

CellKey = tuple[int, str, ModelKey]
"""Rank of the class of service, tenant, model."""


class Flow:
    """Rate of a total that only grows, over its last samples. One sample a second makes that about ten seconds."""

    def __init__(self, total: float, now: float) -> None:
        self._samples: deque[tuple[float, float]] = deque([(now, total)], maxlen=RATE_S + 1)

    def sample(self, total: float, now: float) -> None:
        """Note the total as of `now`."""
        self._samples.append((now, total))

    def rate(self, total: float, now: float) -> float:
        """Per second, up to `now`; 0 before anything can be said."""
        then, before = self._samples[0]
        return max(0.0, total - before) / (now - then) if now > then else 0.0


class Histogram:
    """Times of the last minute, in slices of ten seconds; buckets grow geometrically from 0.1 ms to an hour."""

    def __init__(self) -> None:
        self._slices: deque[tuple[int, dict[int, int]]] = deque(maxlen=_SLICES + 1)

    def add(self, seconds: float, now: float, weight: int = 1) -> None:
        """Count a time that was seen at `now`; `weight` others were like it."""
        number = int(now / (WINDOW_S / _SLICES))
        if not self._slices or self._slices[-1][0] != number:
            self._slices.append((number, {}))
        counts = self._slices[-1][1]
        bucket = int(math.log(seconds / _FLOOR_S) / _GROWTH) + 1 if seconds > _FLOOR_S else 0
        bucket = min(bucket, _BUCKETS)
        counts[bucket] = counts.get(bucket, 0) + weight

    def quantiles(self, shares: Iterable[float], now: float) -> list[float]:
        """Seconds below which these shares of the times lie; 0 if none was seen."""
        oldest = int(now / (WINDOW_S / _SLICES)) - _SLICES
        merged: dict[int, int] = {}
        for number, counts in self._slices:
            if number > oldest:
                for bucket, count in counts.items():
                    merged[bucket] = merged.get(bucket, 0) + count
        return [_quantile(sorted(merged.items()), share) for share in shares]


def _quantile(counts: list[tuple[int, int]], share: float) -> float:
    rank = share * sum(count for _, count in counts)
    seen = 0
    for bucket, count in counts:
        seen += count
        if seen >= rank:
            return _FLOOR_S * math.exp((bucket - 0.5) * _GROWTH) if bucket else _FLOOR_S / 2
    return 0.0


@dataclass(slots=True)
class Cell:
    """What one tenant has produced with one model in one class. Its live requests hold it and add to it."""

    flow: Flow
    prompts: Flow
    produced: int = 0
    """Tokens of answers."""
    read: int = 0
    """Tokens of prompts, counted when their answer began."""
    live: int = 0
    """Requests that hold it."""
    active_at: float = 0.0


@dataclass(slots=True)
class ModelMeter:
    """Times of one model."""

    ttft: Histogram = field(default_factory=Histogram)
    gap: Histogram = field(default_factory=Histogram)
    seen_at: float = 0.0


class Meters:
    """Owned by the core's state."""

    def __init__(self) -> None:
        self.cells: dict[CellKey, Cell] = {}
        self.models: dict[ModelKey, ModelMeter] = {}
        self._workers: dict[str, tuple[Flow, Flow]] = {}

    def enter(self, live: LiveRequest, now: float) -> None:
        """A request begins, or has changed its class or its model: it adds to that cell from now on."""
        self.leave(live)
        key = (live.rank, live.request.tenant, live.key)
        cell = self.cells.get(key)
        if cell is None:
            cell = self.cells[key] = Cell(Flow(0, now), Flow(0, now))
        cell.live += 1
        cell.active_at = now
        live.cell = cell

    def leave(self, live: LiveRequest) -> None:
        """A request has ended."""
        if live.cell is not None:
            live.cell.live -= 1
            live.cell = None

    def first_token(self, live: LiveRequest, now: float) -> None:
        """The answer begins."""
        if live.cell is not None:
            live.cell.read += len(live.request.token_ids)
        self._model(live.key, now).ttft.add(now - live.accepted_at, now)

    def gap(self, live: LiveRequest, now: float, weight: int) -> None:
        """One of a frame's outputs stands for all `weight` of them: how long its request had none."""
        if live.output_at:
            self._model(live.key, now).gap.add(now - live.output_at, now, weight)

    def sample(self, workers: Mapping[str, WorkerView], now: float) -> None:
        """Once a second."""
        for key, cell in list(self.cells.items()):
            if cell.live:
                cell.active_at = now
            elif now - cell.active_at > _IDLE_S:
                del self.cells[key]
                continue
            cell.flow.sample(cell.produced, now)
            cell.prompts.sample(cell.read, now)
        for model in [key for key, meter in self.models.items() if now - meter.seen_at > 2 * WINDOW_S]:
            del self.models[model]
        for gone in self._workers.keys() - workers.keys():
            del self._workers[gone]
        for worker in workers.values():
            tokens, steps = self._flows(worker, now)
            tokens.sample(worker.tokens, now)
            steps.sample(worker.step, now)

    def worker_rates(self, worker: WorkerView, now: float) -> tuple[float, float]:
        """Tokens and steps per second."""
        tokens, steps = self._flows(worker, now)
        return tokens.rate(worker.tokens, now), steps.rate(worker.step, now)

    def _flows(self, worker: WorkerView, now: float) -> tuple[Flow, Flow]:
        flows = self._workers.get(worker.id)
        if flows is None:
            flows = self._workers[worker.id] = (Flow(worker.tokens, now), Flow(worker.step, now))
        return flows

    def _model(self, key: ModelKey, now: float) -> ModelMeter:
        meter = self.models.get(key)
        if meter is None:
            meter = self.models[key] = ModelMeter()
        meter.seen_at = now
        return meter
