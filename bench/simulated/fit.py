"""Fit `StepCost` to measured steps of the real engine, and store it with its error and how it was measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bench import machine
from bench.rows import Row
from bench.simulated.cost import FITTED, StepCost
from bench.simulated.measure import MODEL, Sample, samples
from bench.subject import default_model, plan_of, prompts_of
from worker.backend import ModelSpec
from worker.backends.torch import TorchBackend
from worker.engine.engine import EngineOptions

_MEMORY = 3 << 30
ERROR_TARGET = 0.15
"""Median error that is aimed at, as a share of the step's time."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients and how far off they are, as shares of the steps' times."""

    cost: StepCost
    median_error: float
    worst_tenth: float
    """A tenth of the errors is larger."""


def fit(measured: Sequence[Sample]) -> Fit:
    """Non-negative least squares of relative errors."""
    features = np.array([_features(one) for one in measured], dtype=np.float64)
    seconds = np.array([one.seconds for one in measured])
    scaled = features / seconds[:, None]
    found = _non_negative(scaled, np.ones(len(measured)))
    errors = np.abs(scaled @ found - 1.0)
    cost = StepCost(*(float(f"{value:.4g}") for value in found))
    return Fit(cost, float(np.median(errors)), float(np.quantile(errors, 0.9)))


def quickest(measured: Iterable[Sample]) -> list[Sample]:
    """Of equal steps the quickest: what else ran on the machine only ever made one slower."""
    best: dict[tuple[int, int, int, int], Sample] = {}
    for one in measured:
        kind = (one.decodes, one.context, one.prefill, one.attended)
        if kind not in best or one.seconds < best[kind].seconds:
            best[kind] = one
    return list(best.values())


def measure_and_store(path: Path = FITTED) -> Iterator[Row]:
    """Step the real engine, fit, write the file; rows say how well it fits."""
    folder = default_model()
    backend = TorchBackend(threads=torch.get_num_threads(), options=EngineOptions(drafting=False))
    backend.load(ModelSpec(MODEL, "1", folder, plan=plan_of(folder)), _MEMORY)
    measured = quickest(samples(backend, prompts_of(folder)))
    found = fit(measured)
    kinds = len(measured)
    how = {
        "model": "the default model, drafting off",
        "threads": torch.get_num_threads(),
        "kinds of steps": kinds,
        "median error": round(found.median_error, 4),
        "error exceeded by a tenth": round(found.worst_tenth, 4),
        "machine": machine.describe(),
    }
    path.write_text(json.dumps({"seconds": dataclasses.asdict(found.cost), "measured": how}, indent=1) + "\n")
    yield Row(
        "engine model: median error",
        found.median_error,
        None,
        "of the step",
        None,
        ERROR_TARGET,
        found.median_error <= ERROR_TARGET,
    )
    yield Row("engine model: error exceeded by a tenth", found.worst_tenth, None, "of the step", None, None, True)


def _features(one: Sample) -> tuple[float, ...]:
    """In the order of `StepCost`'s fields."""
    return (1.0, one.decodes, one.context, float(one.prefill > 0), one.prefill, one.attended)


def _non_negative(features: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares with no coefficient below zero: the most negative one is left out until there is none."""
    used = list(range(features.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(features[:, used], wanted, rcond=None)
        if (found >= 0).all():
            break
        used.pop(int(np.argmin(found * np.abs(features[:, used]).mean(axis=0))))
    result = np.zeros(features.shape[1])
    result[used] = found
    return result
