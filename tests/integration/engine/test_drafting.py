"""Guessed tokens change how many steps are taken, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmos.clock import SystemClock
from tests.fakes.clock import ManualClock
from tests.integration.engine.tiny import Transcript, attempt, logprobs, prompts
from worker.backend import Attempt, FinishReason, Sampling
from worker.engine.device import select_device
from worker.engine.engine import Engine, EngineOptions
from worker.engine.loading import load

pytestmark = pytest.mark.torch

FEW = {5: 40.0, 6: 40.0, 7: 40.0}
"""A random model repeats itself once it has only few tokens to choose from."""
GREEDY = Sampling(temperature=0, logprobs=1, logit_bias=FEW)
SAMPLED = Sampling(temperature=0.5, seed=6, logprobs=0, logit_bias=FEW)
PENALIZED = Sampling(temperature=0, repetition_penalty=1.05, frequency_penalty=0.02, logprobs=0, logit_bias=FEW)


class TickingClock(ManualClock):
    """Time passes only when somebody asks: all steps take as long, so a guess costs next to nothing."""

    def monotonic(self) -> float:
        self.advance(1.0)
        return super().monotonic()


@pytest.fixture(scope="module")
def decoder(written: Callable[[str], tuple[Path, Any]]) -> Any:
    return load(written("llama")[0], select_device("cpu"))


def run(decoder: Any, requests: list[Attempt], *, drafting: bool, blocks: int = 200) -> Transcript:
    engine = Engine(decoder, blocks, TickingClock(), options=EngineOptions(drafting=drafting))
    for request in requests:
        engine.admit(request)
    found = Transcript().run(engine)
    assert engine.blocks().free == blocks
    return found


def repeating() -> list[Attempt]:
    """Requests whose answers repeat themselves."""
    kinds = (GREEDY, SAMPLED, PENALIZED)
    return [
        attempt(str(number), prompt * 3, 60, sampling=kinds[number % 3], choices=1 + (number == 4))
        for number, prompt in enumerate(prompts((20, 30, 5, 40, 9), seed=9))
    ]


def test_the_same_tokens_in_fewer_steps(decoder: Any) -> None:
    for requests in ([repeating()[0]], repeating()):
        plain, drafted = (run(decoder, requests, drafting=drafting) for drafting in (False, True))
        assert logprobs(drafted) == logprobs(plain)
        assert drafted.finishes == plain.finishes
        assert len(drafted.outputs) < 0.9 * len(plain.outputs)


def test_drafts_survive_preemption_and_resume(decoder: Any) -> None:
    plain = run(decoder, repeating(), drafting=False)
    scarce = run(decoder, repeating(), drafting=True, blocks=8)
    assert logprobs(scarce) == logprobs(plain)
    known = {0: plain.tokens["3", 0][:25]}
    engine = Engine(decoder, 20, SystemClock())
    engine.admit(replace(repeating()[3], resume=known))
    rest = Transcript({("3", 0): 25}).run(engine)
    assert rest.tokens["3", 0] == plain.tokens["3", 0][25:]


def test_a_choice_ends_inside_a_guess_as_it_would_without(decoder: Any) -> None:
    request = repeating()[0]
    whole = run(decoder, [request], drafting=False).tokens["0", 0]
    stop = whole[40]
    for changed in (
        replace(request, stop_token_ids=frozenset({stop})),
        replace(request, stop_token_ids=frozenset({stop}), min_tokens=45),
        replace(request, max_tokens=41),
    ):
        plain, drafted = (run(decoder, [changed], drafting=drafting) for drafting in (False, True))
        assert logprobs(drafted) == logprobs(plain)
        assert drafted.finishes == plain.finishes


def test_no_token_beyond_what_is_still_wanted(decoder: Any) -> None:
    request = repeating()[0]
    engine = Engine(decoder, 20, ManualClock())
    engine.admit(request)
    found = Transcript().run(engine, steps=10)
    have = len(found.tokens["0", 0])
    engine.cancel("0", 0, have + 2)
    found.run(engine)
    assert len(found.tokens["0", 0]) == have + 2
    assert FinishReason.LENGTH not in found.finishes.values()
    assert engine.blocks().free == 20
