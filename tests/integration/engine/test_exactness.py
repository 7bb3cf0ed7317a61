"""The same request gives the same tokens alone, in any batch, among arrivals and cancels, and resumed anywhere."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.engine.tiny import FAMILIES, Transcript, attempt, logprobs, prompts
from worker.backend import Attempt, ModelSpec, Sampling
from worker.backends.torch import TorchBackend

pytestmark = pytest.mark.torch

ANSWER = 10
KINDS = (
    Sampling(temperature=0, logprobs=2),
    Sampling(temperature=1.0, seed=3, logprobs=0),
    Sampling(temperature=1.3, seed=2**63 + 5, top_p=0.9, logprobs=1),
    Sampling(temperature=0.9, seed=5, top_k=40, repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.2),
)
LENGTHS = (1, 3, 8, 20, 63, 64, 65, 70, 100, 127, 128, 129, 150, 31, 40, 17)

Answers = dict[tuple[str, int], list[int]]


def mixed() -> list[Attempt]:
    """Sixteen requests of different lengths and kinds, some with several choices."""
    return [
        attempt(str(number), prompt, ANSWER, sampling=KINDS[number % len(KINDS)], choices=1 + (number % 5 == 1))
        for number, prompt in enumerate(prompts(LENGTHS, seed=4))
    ]


def run_alone(backend: TorchBackend, requests: list[Attempt]) -> Transcript:
    found = Transcript()
    for request in requests:
        backend.admit(request)
        found.run(backend)
    return found


@pytest.fixture(scope="module")
def alone(written: Callable[[str], tuple[Path, Any]]) -> Callable[[str], Transcript]:
    """The mixed requests of a family, each run with nobody else, in one thread; computed once."""

    @functools.cache
    def of(family: str) -> Transcript:
        backend = TorchBackend(threads=1)
        backend.load(ModelSpec("tiny", "1", written(family)[0]), 64 << 20)
        return run_alone(backend, mixed())

    return of


@pytest.mark.parametrize(("family", "threads"), [*((family, 1) for family in FAMILIES), ("llama", 3)])
def test_a_request_is_the_same_alone_and_among_others(
    family: str, threads: int, loaded: Callable[..., TorchBackend], alone: Callable[[str], Transcript]
) -> None:
    expected = alone(family)
    backend = loaded(family, threads=threads)
    order = mixed()
    random.Random(threads).shuffle(order)
    for request in order:
        backend.admit(request)
    together = Transcript().run(backend)
    assert together.tokens == expected.tokens
    assert logprobs(together) == logprobs(expected)


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_arrivals_and_cancels_of_others_change_nothing(
    family: str, loaded: Callable[..., TorchBackend], alone: Callable[[str], Transcript]
) -> None:
    backend, found = loaded(family), Transcript()
    source = random.Random(8)
    waiting = mixed()
    strangers = 0
    while waiting or backend.busy():
        if waiting and source.random() < 0.5:
            backend.admit(waiting.pop(source.randrange(len(waiting))))
        if waiting and source.random() < 0.5:
            strangers += 1
            stranger = prompts([source.randrange(1, 150)], seed=strangers)[0]
            backend.admit(attempt(f"stranger {strangers}", stranger, 30, sampling=KINDS[strangers % 4]))
        if source.random() < 0.4:
            backend.cancel(f"stranger {source.randint(0, strangers)}")
        found.run(backend, steps=1)
    assert strangers > 5
    assert {key: tokens for key, tokens in found.tokens.items() if "stranger" not in key[0]} == alone(family).tokens


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2"])
def test_a_resumed_request_goes_on_with_the_same_tokens(
    family: str, loaded: Callable[..., TorchBackend], alone: Callable[[str], Transcript]
) -> None:
    whole = alone(family)
    source = random.Random(1)
    resumed: dict[tuple[str, int], int] = {}
    another = loaded(family)
    for request in mixed():
        keys = [(request.request_id, choice) for choice in range(request.choices)]
        resumed.update((key, source.randrange(ANSWER)) for key in keys)
        known = {choice: whole.tokens[key][: resumed[key]] for choice, key in enumerate(keys)}
        another.admit(replace(request, resume=known))
    rest = Transcript(resumed).run(another)
    assert rest.tokens == {key: tokens[resumed[key] :] for key, tokens in whole.tokens.items()}
    assert logprobs(rest).items() <= logprobs(whole).items()


def test_a_choice_is_the_same_with_and_without_its_siblings(loaded: Callable[..., TorchBackend]) -> None:
    backend = loaded("llama")
    [prompt] = prompts([70])
    options = Sampling(temperature=1.0, seed=9)
    backend.admit(attempt("all", prompt, ANSWER, sampling=options, choices=4))
    every = Transcript().run(backend).tokens
    assert len({tuple(tokens) for tokens in every.values()}) == 4
    backend.admit(attempt("one", prompt, ANSWER, sampling=options, choices=4, finished_choices=frozenset({0, 1, 3})))
    assert Transcript().run(backend).tokens == {("one", 2): every["all", 2]}


def test_a_thread_count_changes_no_bit_of_the_logits(loaded: Callable[..., TorchBackend]) -> None:
    found = []
    for threads in (1, 2, 3):
        backend = loaded("gemma2")
        torch.set_num_threads(threads)
        found.append(logprobs(run_alone(backend, mixed()[9:12])))
    assert found[0] and all(other == found[0] for other in found)
