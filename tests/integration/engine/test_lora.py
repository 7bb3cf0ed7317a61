"""Adapters in one batch: each request as if its adapter were alone, on both paths; loaded and dropped at run time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from llmos.errors import SourceError, Unavailable
from tests.fakes.adapters import RandomAdapter
from tests.integration.engine.tiny import Transcript, attempt, generate, logprobs, prompts
from tests.integration.engine_fast import tiny as fast_tiny
from worker import kernels
from worker.backend import Attempt, ModelSpec, Sampling
from worker.backends.torch import TorchBackend

pytestmark = pytest.mark.torch

ANSWER = 8
ADAPTERS = 8
TARGETS = (("q_proj", "v_proj"), ("o_proj", "down_proj"), ("gate_proj", "up_proj", "k_proj"))
Tiny = tuple[TorchBackend, Any, list[RandomAdapter]]


def adapters_of(model: Any) -> list[RandomAdapter]:
    """Of several ranks and targets; the last three change everything."""
    few = [RandomAdapter.of(model, n, rank=1 + 3 * n, targets=targets) for n, targets in enumerate(TARGETS)]
    return few + [RandomAdapter.of(model, n, rank=2 + n) for n in range(len(few), ADAPTERS)]


def load_adapter(backend: TorchBackend, folder: Path, number: int) -> None:
    backend.load(ModelSpec(f"a{number}", "1", folder / f"a{number}", base="tiny"), 0)


@pytest.fixture(scope="session")
def fast_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    model = fast_tiny.model("llama")
    model.save_pretrained(folder := tmp_path_factory.mktemp("fast"))
    return folder, model


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Tiny]:
    """A backend with a model and eight adapters, `a0` to `a7`: a family on the general path, or `kernels`."""

    def of(path: str) -> Tiny:
        if path == "kernels" and not kernels.available():
            pytest.skip(kernels.reason())
        if path == "kernels":
            folder, model = request.getfixturevalue("fast_folder")
        else:
            folder, model = request.getfixturevalue("written")(path)
        backend = TorchBackend(threads=1, precision="int8" if path == "kernels" else "fp32")
        backend.load(ModelSpec("tiny", "1", folder), 64 << 20)
        made = adapters_of(model)
        for number, adapter in enumerate(made):
            adapter.write(tmp_path / f"a{number}")
            load_adapter(backend, tmp_path, number)
        return backend, model, made

    return of


def sixteen() -> list[Attempt]:
    """Two for each adapter, and among them some without: of different lengths and kinds."""
    kinds = (Sampling(temperature=0, logprobs=0), Sampling(temperature=1.0, seed=5, logprobs=1))
    lengths = (1, 3, 8, 20, 63, 64, 65, 70, 100, 31, 40, 17, 5, 9, 33, 12)
    return [
        attempt(str(number), prompt, ANSWER, sampling=kinds[number % 2], adapter=f"a{number // 2}")
        for number, prompt in enumerate(prompts(lengths, seed=9))
    ]


def run(backend: TorchBackend, *requests: Attempt) -> Transcript:
    for request in requests:
        backend.admit(request)
    return Transcript().run(backend)


@pytest.mark.parametrize("path", ["llama", "gemma3", "kernels"])
def test_eight_adapters_in_one_batch_of_sixteen_equal_each_alone(path: str, tiny: Callable[[str], Tiny]) -> None:
    backend, _, _ = tiny(path)
    plain = [replace(one, request_id=f"plain {one.request_id}", adapter="") for one in sixteen()]
    alone: dict[Any, Any] = {}
    for one in (*sixteen(), *plain):
        alone |= logprobs(run(backend, one))
    assert all(alone[f"plain {name}", 0, index] != entry for (name, _, index), entry in alone.items() if name.isdigit())
    batch = logprobs(run(backend, *sixteen()))
    assert batch == {key: entry for key, entry in alone.items() if key in batch}
    mixed = [*sixteen(), *plain]
    random.Random(3).shuffle(mixed)
    assert logprobs(run(backend, *mixed)) == alone


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_tokens_are_those_of_the_merged_model(family: str, tiny: Callable[[str], Tiny]) -> None:
    """PEFT's arithmetic: W + scale B A, by transformers' own `generate`."""
    backend, model, adapters = tiny(family)
    texts = prompts([1, 9, 33, 64, 70, 20, 5, 40], seed=2)
    requests = [attempt(str(n), text, ANSWER, adapter=f"a{n}") for n, text in enumerate(texts)]
    found = run(backend, *requests).tokens
    expected = [generate(adapter.merged(model), text, ANSWER) for adapter, text in zip(adapters, texts, strict=True)]
    assert [found[str(n), 0] for n in range(ADAPTERS)] == expected
    assert len({tuple(tokens) for tokens in expected} | {tuple(generate(model, texts[0], ANSWER))}) > ADAPTERS - 1


@pytest.mark.parametrize("path", ["llama", "kernels"])
def test_a_resumed_request_goes_on_with_the_same_tokens(path: str, tiny: Callable[[str], Tiny]) -> None:
    backend, _, _ = tiny(path)
    whole = run(backend, *sixteen())
    known = {str(n): whole.tokens[str(n), 0][: 1 + n % (ANSWER - 1)] for n in range(16)}
    for request in sixteen():
        backend.admit(replace(request, resume={0: known[request.request_id]}))
    rest = Transcript({(name, 0): len(tokens) for name, tokens in known.items()}).run(backend)
    assert logprobs(rest).items() <= logprobs(whole).items()
    assert all(known[name] + rest.tokens[name, 0] == whole.tokens[name, 0] for name in known)


@pytest.mark.parametrize("path", ["llama", "kernels"])
def test_adapters_come_and_go_while_others_run(path: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    backend, model, _ = tiny(path)
    requests = sixteen()
    expected = logprobs(run(backend, *requests))
    for request in requests:
        backend.admit(request)
    found = Transcript().run(backend, steps=3)
    backend.unload("a1")
    backend.unload("a6")
    found.run(backend, steps=1)
    RandomAdapter.of(model, 77).write(tmp_path / "a6")
    load_adapter(backend, tmp_path, 6)
    found.run(backend)
    ended = {name for name, _ in found.finishes}
    assert ended == {str(n) for n in range(16)} - {"2", "3", "12", "13"}
    assert {key: value for key, value in logprobs(found).items() if key[0] in ended}.items() <= expected.items()
    with pytest.raises(Unavailable):
        backend.admit(requests[2])
    assert logprobs(run(backend, requests[12])) != {key: v for key, v in expected.items() if key[0] == "12"}
    load_adapter(backend, tmp_path, 1)
    assert logprobs(run(backend, requests[2])).items() <= expected.items()


def test_an_adapter_needs_its_base_and_must_fit_it(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    backend, _, _ = tiny("llama")
    assert backend.blocks()["a3"].total == 0
    other = transformers.LlamaForCausalLM(fast_tiny.config("llama"))
    RandomAdapter.of(other, 1).write(tmp_path / "a9")
    with pytest.raises(SourceError, match="does not fit"):
        load_adapter(backend, tmp_path, 9)
    backend.unload("tiny")
    assert not backend.blocks()
    with pytest.raises(Unavailable, match="not loaded"):
        load_adapter(backend, tmp_path, 0)
