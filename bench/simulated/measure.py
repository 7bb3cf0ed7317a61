"""Times of the real engine's steps, by what each step computes: what the engine model is fitted to."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.subject import Prompts
from worker.backend import Attempt, Epoch, Sampling
from worker.backends.torch import TorchBackend

MODEL = "model"
DECODES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (32, 512)
MOST_CONTEXT = 8192
"""Tokens of all decoding sequences of a measurement together: their prompts have to be computed first."""
STEPS = 8
CHUNK, PROMPT = 128, 1536
BESIDE = (0, 4, 16)
"""Sequences that decode while a long prompt is computed."""
BESIDE_CONTEXT = 128
ROUNDS = 3
_GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Sample:
    """A step and the seconds that it took."""

    decodes: int
    """Sequences that got a token each."""
    context: int
    """Tokens that these attended to, all together."""
    prefill: int
    """Prompt tokens computed."""
    attended: int
    """Tokens that those attended to, all together."""
    seconds: float


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
        """Seconds."""
        begun = time.perf_counter()
        self._backend.step()
        return time.perf_counter() - begun

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
    for _ in range(ROUNDS):
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
