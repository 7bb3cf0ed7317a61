"""Ways to disturb requests, and how many of them then give what they give undisturbed.

Undisturbed: alone, without prefix cache and drafting. Disturbed: among each other, with all that the engine does by
default, and interrupted, preempted, put into other batches or continued from the prefix cache.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from gateway.text.prefix import prefix_hashes
from llmos.clock import SystemClock
from worker.backend import Attempt, FinishReason, Sampling
from worker.engine.engine import Engine, EngineOptions
from worker.engine.grammar.grammars import Grammars
from worker.engine.lora import Adapter
from worker.engine.paged import Servable

BLOCKS = 128
_ROWS = 8
"""Choices that are disturbed together."""

Key = tuple[str, int]
"""Request and choice."""
Answer = tuple[tuple[int, ...], FinishReason | None]


class Interrupted(AssertionError):
    """An attempt failed, or the disturbance did not take place."""


@dataclass(slots=True)
class Answers:
    """What the attempts of an engine have given."""

    tokens: dict[Key, list[int]] = field(default_factory=dict)
    finishes: dict[Key, FinishReason] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)

    def collect(self, engine: Engine, steps: int = -1) -> None:
        """Step until the engine is idle, or `steps` times."""
        while steps and engine.busy():
            result = engine.step()
            if result.failures:
                raise Interrupted(result.failures[0].message)
            for output in result.outputs:
                key = (output.request_id, output.choice)
                self.tokens.setdefault(key, []).extend(output.token_ids)
                self.cached[output.request_id] = self.cached.get(output.request_id, 0) + output.cached_tokens
                if output.finish is not None:
                    self.finishes[key] = output.finish
            steps -= 1

    def of(self, attempt: Attempt) -> list[Answer]:
        """Per choice."""
        keys = [(attempt.request_id, choice) for choice in range(attempt.choices)]
        return [(tuple(self.tokens.get(key, ())), self.finishes.get(key)) for key in keys]


@dataclass(frozen=True, slots=True)
class Bench:
    """A model, the adapters that requests name, and what follows their constraints."""

    decoder: Servable
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    grammars: Grammars | None = None

    @contextmanager
    def engine(self, *, max_running: int = 64, drafting: bool = True) -> Iterator[Engine]:
        """An engine of its own; one at a time."""
        options = EngineOptions(max_running=max_running, drafting=drafting)
        engine = Engine(self.decoder, BLOCKS, SystemClock(), options=options, grammars=self.grammars)
        for name, adapter in self.adapters.items():
            engine.load_adapter(name, adapter)
        yield engine
        for name in self.adapters:
            engine.drop_adapter(name)
        if engine.blocks().free != BLOCKS:
            raise Interrupted("blocks were not given back")

    def undisturbed(self, attempts: Sequence[Attempt]) -> Answers:
        """Each alone."""
        answers = Answers()
        for attempt in attempts:
            with self.engine(drafting=False) as engine:
                engine.admit(attempt)
                answers.collect(engine)
        return answers


Disturbance = Callable[[Bench, Sequence[Attempt], Answers, random.Random], tuple[int, int]]
"""How many of the disturbed requests gave the expected answers, and how many were disturbed."""


def resumed(bench: Bench, attempts: Sequence[Attempt], expected: Answers, source: random.Random) -> tuple[int, int]:
    """Each goes on in a fresh engine at a random index, as on another worker."""
    answers = Answers()
    with bench.engine() as engine:
        for attempt in attempts:
            whole = [tokens for tokens, _ in expected.of(attempt)]
            known = {choice: tokens[: source.randrange(len(tokens))] for choice, tokens in enumerate(whole)}
            answers.tokens.update({(attempt.request_id, choice): list(tokens) for choice, tokens in known.items()})
            engine.admit(replace(attempt, resume=known))
        answers.collect(engine)
    return _exact(attempts, answers, expected), len(attempts)


def preempted(bench: Bench, attempts: Sequence[Attempt], expected: Answers, source: random.Random) -> tuple[int, int]:
    """Each has to give way to more urgent ones at a random step, and is computed again."""
    exact = disturbed = 0
    width = max(1, _ROWS // max(attempt.choices for attempt in attempts))
    for first in range(0, len(attempts), width):
        group = attempts[first : first + width]
        rows = sum(attempt.choices for attempt in group)
        answers = Answers()
        with bench.engine(max_running=rows) as engine:
            for attempt in group:
                engine.admit(attempt)
            while not all(answers.of(attempt)[0][0] for attempt in group):
                answers.collect(engine, steps=1)
            answers.collect(engine, steps=source.randrange(group[0].max_tokens // 2))
            running = [attempt for attempt in group if None in (finish for _, finish in answers.of(attempt))]
            urgent = replace(group[0], request_id="urgent", priority=0, choices=rows, max_tokens=2, constraint=None)
            engine.admit(urgent)
            answers.collect(engine)
            if engine.preemptions < len(running):
                raise Interrupted("not all were preempted")
        exact += _exact(running, answers, expected)
        disturbed += len(running)
    return exact, disturbed


def rebatched(bench: Bench, attempts: Sequence[Attempt], expected: Answers, source: random.Random) -> tuple[int, int]:
    """All together in random order, among strangers that come and are cancelled."""
    answers, waiting, strangers = Answers(), list(attempts), 0
    with bench.engine() as engine:
        while waiting or engine.busy():
            if waiting and source.random() < 0.4:
                engine.admit(waiting.pop(source.randrange(len(waiting))))
            if waiting and source.random() < 0.3:
                strangers += 1
                engine.admit(_stranger(attempts[strangers % len(attempts)], strangers, source))
            if source.random() < 0.2:
                engine.cancel(f"stranger {source.randint(0, strangers)}", None, None)
            answers.collect(engine, steps=1)
    return _exact(attempts, answers, expected), len(attempts)


def continued(bench: Bench, attempts: Sequence[Attempt], expected: Answers, source: random.Random) -> tuple[int, int]:
    """Each finds its prompt, or a random part of it, in the prefix cache."""
    answers = Answers()
    with bench.engine() as engine:
        for attempt in attempts:
            hashes = prefix_hashes(attempt.prompt, model_version="1", tenant="t", adapter=attempt.adapter)
            known = attempt.prompt[: source.randrange(64, len(attempt.prompt))]
            before = replace(attempt, request_id=f"before {attempt.request_id}", prompt=known, max_tokens=1)
            engine.admit(replace(before, prefix_hashes=hashes[: len(known) // 64]))
            while engine.epoch(before.request_id):
                answers.collect(engine, steps=1)
            engine.admit(replace(attempt, prefix_hashes=hashes))
            answers.collect(engine, steps=source.randrange(1, 20))
        answers.collect(engine)
    if not all(answers.cached[attempt.request_id] >= 64 for attempt in attempts):
        raise Interrupted("nothing was found in the cache")
    return _exact(attempts, answers, expected), len(attempts)


DISTURBANCES: dict[str, Disturbance] = {
    "resumed": resumed,
    "preempted": preempted,
    "re-batched": rebatched,
    "cache hit": continued,
}


def _exact(attempts: Sequence[Attempt], answers: Answers, expected: Answers) -> int:
    return sum(answers.of(attempt) == expected.of(attempt) for attempt in attempts)


def _stranger(like: Attempt, number: int, source: random.Random) -> Attempt:
    prompt = like.prompt[: source.randrange(1, len(like.prompt))]
    sampling = Sampling(seed=number)
    return replace(like, request_id=f"stranger {number}", prompt=prompt, sampling=sampling, choices=1, constraint=None)
