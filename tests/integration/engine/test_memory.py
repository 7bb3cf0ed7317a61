"""Prefix cache and preemption: what is computed, and that the bytes stay the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.text.prefix import prefix_hashes
from llmos.clock import SystemClock
from tests.integration.engine.tiny import Transcript, attempt, logprobs, prompts
from worker.backend import Attempt, Sampling, Stage
from worker.engine.device import select_device
from worker.engine.engine import Engine
from worker.engine.loading import load

pytestmark = pytest.mark.torch

OPTIONS = Sampling(temperature=1.0, seed=11, logprobs=1)


@pytest.fixture(scope="module")
def decoder(written: Callable[[str], tuple[Path, Any]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("long")
    for file in written("llama")[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return load(folder, select_device("cpu"))


def make(decoder: Any, blocks: int = 100) -> Engine:
    return Engine(decoder, blocks, SystemClock(), name="tiny")


def hashed(name: str, prompt: Sequence[int], tenant: str = "a", **options: Any) -> Attempt:
    hashes = prefix_hashes(prompt, model_version="1", tenant=tenant)
    return attempt(name, prompt, 12, sampling=OPTIONS, prefix_hashes=hashes, **options)


def prefilled(found: Transcript) -> dict[str, int]:
    return {done.request_id: done.tokens for done in found.stages if done.stage is Stage.PREFILL}


def cached(found: Transcript) -> dict[str, int]:
    return {output.request_id: output.cached_tokens for output in found.outputs if output.index == 0}


def test_only_the_tail_after_a_cached_prefix_is_computed(decoder: Any) -> None:
    shared, *tails = prompts((1024, 30, 7))
    apart = Transcript()
    for name, tail in zip("ab", tails, strict=True):
        engine = make(decoder)
        engine.admit(hashed(name, shared + tail))
        apart.run(engine)
    engine = make(decoder)
    found = Transcript()
    for name, tail in zip("ab", tails, strict=True):
        engine.admit(hashed(name, shared + tail))
        found.run(engine)
    assert prefilled(found) == {"a": 1024 + 30, "b": 7}
    assert cached(found) == {"a": 0, "b": 1024}
    assert found.tokens == apart.tokens
    assert logprobs(found) == logprobs(apart)
    engine.admit(hashed("again", shared))
    assert prefilled(Transcript().run(engine)) == {"again": 64}


def test_nobody_finds_what_another_tenant_computed(decoder: Any) -> None:
    [prompt] = prompts([200])
    engine, found = make(decoder), Transcript()
    engine.admit(hashed("a", prompt, "one tenant"))
    found.run(engine)
    engine.admit(hashed("b", prompt, "another"))
    engine.admit(replace(hashed("c", prompt), prefix_hashes=()))
    found.run(engine)
    assert prefilled(found) == {"a": 200, "b": 200, "c": 200}
    assert set(cached(found).values()) == {0}


def test_preempted_attempts_go_on_with_the_same_tokens(decoder: Any) -> None:
    lengths = enumerate(prompts((120, 60, 50, 63, 127), seed=5))
    requests = [hashed(str(number), prompt, choices=1 + number % 2, priority=1) for number, prompt in lengths]
    requests = [replace(request, max_tokens=130) for request in requests]
    urgent = [replace(hashed(f"urgent {n}", prompts([70])[0], priority=0), max_tokens=70) for n in range(3)]
    plenty, scarce = make(decoder), make(decoder, blocks=12)
    results = []
    for engine in (plenty, scarce):
        for request in requests:
            engine.admit(request)
        found = Transcript()
        for request in urgent:
            found.run(engine, steps=40)
            engine.admit(request)
        results.append(found.run(engine))
    expected, found = results
    assert (plenty.preemptions, scarce.preemptions > 1) == (0, True)
    assert found.tokens == expected.tokens
    assert logprobs(found) == logprobs(expected)
    assert scarce.blocks().free == 12


def test_the_cache_says_what_it_holds(decoder: Any) -> None:
    engine = make(decoder, blocks=5)
    known: set[int] = set()
    numbers: list[int] = []
    every: set[int] = set()
    for number, prompt in enumerate(prompts((200, 140, 260), seed=6)):
        request = hashed(str(number), prompt)
        every.update(request.prefix_hashes)
        engine.admit(request)
        while engine.busy():
            for change in engine.step().cache:
                assert change.model == "tiny"
                numbers.append(change.number)
                known = (known - set(change.removed)) | set(change.stored)
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(known) < len(every)
    assert known >= set(request.prefix_hashes)
