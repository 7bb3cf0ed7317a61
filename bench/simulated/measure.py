"""Times of the real engine's steps, by what each step computes: what the engine model is fitted to.

Processor time of one thread: what else runs on the machine hardly changes it. `measure_and_store` writes the fitted
coefficients with their error and how they were measured.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import machine
from bench.rows import Row
from bench.simulated.cost import FITTED
from bench.simulated.fit import Sample, fit, quickest
from bench.subject import Prompts, default_model, plan_of, prompts_of
from worker.backend import Attempt, Epoch, ModelSpec, Sampling
from worker.backends.torch import TorchBackend
from worker.engine.engine import EngineOptions

MODEL = "model"
DECODES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (32, 512)
MOST_CONTEXT = 4096
"""Tokens of all decoding sequences of a measurement together: their prompts have to be computed first."""
STEPS = 6
CHUNK, PROMPT = 128, 1536
BESIDE = (0, 8)
"""Sequences that decode while a long prompt is computed."""
BESIDE_CONTEXT = 128
_MEMORY = 3 << 30
ERROR_TARGET = 0.15
"""Median error that is aimed at, as a share of the step's time."""
_GREEDY = Sampling(temperature=0.0)


class Stepper:
    """Admits prompts to a backend and steps it."""

    def __init__(self, backend: TorchBackend, text: Prompts) -> None:
        self._backend = backend
        self._text = text
        self._numbers = itertools.count()

    def admit(self, length: int, answer: int) -> str:
        """Another prompt that no cache has."""
        number = next(self._numbers)
        prompt = self._text(number, length)
        attempt = Attempt(str(number), Epoch(1, 1), MODEL, prompt, answer, sampling=_GREEDY, ignore_eos=True)
        self._backend.admit(attempt)
        return attempt.request_id

    def step(self) -> float:
        """Processor seconds."""
        begun = time.process_time()
        self._backend.step()
        return time.process_time() - begun

    def decoding(self, count: int, context: int) -> list[str]:
        """Sequences that have had their first token, of about that context."""
        names = [self.admit(context, 4096) for _ in range(count)]
        waiting = set(names)
        while waiting:
            waiting -= {output.request_id for output in self._backend.step().outputs}
        return names

    def drop(self, names: Sequence[str]) -> None:
        """Forget sequences."""
        for name in names:
            self._backend.cancel(name)


def measure_and_store(path: Path = FITTED) -> Iterator[Row]:
    """Step the real engine, fit, write the file; rows say how well it fits."""
    folder = default_model()
    backend = TorchBackend(threads=1, options=EngineOptions(drafting=False))
    backend.load(ModelSpec(MODEL, "1", folder, plan=plan_of(folder)), _MEMORY)
    measured = quickest(samples(backend, prompts_of(folder)))
    found = fit(measured)
    kinds = len(measured)
    how = {
        "model": "the default model, drafting off",
        "time": "processor time of one thread",
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


def samples(backend: TorchBackend, text: Prompts) -> Iterator[Sample]:
    """Steps of all kinds: decode alone, prefill alone, both."""
    stepper = Stepper(backend, text)
    for count, context in itertools.product(DECODES, CONTEXTS):
        if count * context <= MOST_CONTEXT:
            yield from _decode(stepper, count, context)
    for beside in BESIDE:
        yield from _prefill(stepper, beside)


def _decode(stepper: Stepper, count: int, context: int) -> Iterator[Sample]:
    names = stepper.decoding(count, context)
    stepper.step()
    for _ in range(STEPS):
        # Sequences that had their first token earlier are a few tokens longer; that is less than a block.
        yield Sample(count, count * (context + STEPS), 0, 0, stepper.step())
    stepper.drop(names)


def _prefill(stepper: Stepper, beside: int) -> Iterator[Sample]:
    names = stepper.decoding(beside, BESIDE_CONTEXT)
    name = stepper.admit(PROMPT, 4)
    for first in range(0, PROMPT, CHUNK):
        attended = sum(range(first + 1, first + CHUNK + 1))
        yield Sample(beside, beside * (BESIDE_CONTEXT + PROMPT // CHUNK), CHUNK, attended, stepper.step())
    stepper.drop([name])
    for length in (16, 64):
        for _ in range(STEPS // 2):
            name = stepper.admit(length, 4)
            yield Sample(beside, beside * BESIDE_CONTEXT, length, length * (length + 1) // 2, stepper.step())
            stepper.drop([name])
    stepper.drop(names)
