"""The backend through the kernels: the same tokens alone, in a batch, among cancels, resumed anywhere; and without."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmos.store import Store, import_model, planning
from llmos.store.precision import PrecisionPlan
from tests.fakes.models import model_files
from tests.integration.engine.test_exactness import ANSWER, KINDS, mixed, run_alone
from tests.integration.engine.tiny import Transcript, attempt, logprobs, prompts
from tests.integration.engine_fast import tiny
from worker import kernels
from worker.backend import ModelSpec, Sampling
from worker.backends.torch import TorchBackend
from worker.engine.fast import fast_decoder
from worker.engine.fast.support import FAMILIES
from worker.fingerprint import torch_fingerprint
from worker.kernels import Kind, abi
from worker.models import hold

pytestmark = pytest.mark.torch

BUDGET = 64 << 20
PLAN = PrecisionPlan.uniform("int8", 3)
Load = Callable[..., TorchBackend]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a family that the kernels can run; written once."""

    @functools.cache
    def of(family: str) -> Path:
        path = tmp_path_factory.mktemp(f"int8-{family}")
        tiny.model(family).save_pretrained(path)
        return path

    return of


@pytest.fixture(scope="session")
def load(folder: Callable[[str], Path]) -> Load:
    """A backend in int8 that has loaded a family as `tiny`."""
    if not kernels.available():
        pytest.skip(kernels.reason())

    def of(family: str, threads: int = 1) -> TorchBackend:
        backend = TorchBackend(threads=threads, precision="int8")
        backend.load(ModelSpec("tiny", "1", folder(family)), BUDGET)
        return backend

    return of


@pytest.fixture(scope="session")
def alone(load: Load) -> Callable[[str], Transcript]:
    """The mixed requests of a family, each run with nobody else, in one thread; computed once."""
    return functools.cache(lambda family: run_alone(load(family), mixed()))


@pytest.mark.parametrize(("family", "threads"), [("llama", 1), ("llama", 2), ("qwen3", 1), ("gemma3", 2)])
def test_a_request_is_the_same_alone_and_among_others(
    family: str, threads: int, load: Load, alone: Callable[[str], Transcript]
) -> None:
    expected = alone(family)
    backend = load(family, threads)
    order = mixed()
    random.Random(threads).shuffle(order)
    for request in order:
        backend.admit(request)
    together = Transcript().run(backend)
    assert together.tokens == expected.tokens
    assert logprobs(together) == logprobs(expected)


def test_arrivals_and_cancels_of_others_change_nothing(load: Load, alone: Callable[[str], Transcript]) -> None:
    backend, found = load("gemma3"), Transcript()
    source = random.Random(8)
    waiting = mixed()
    strangers = 0
    while waiting or backend.busy():
        if waiting and source.random() < 0.5:
            backend.admit(waiting.pop(source.randrange(len(waiting))))
            strangers += 1
            stranger = prompts([source.randrange(1, 150)], seed=strangers)[0]
            backend.admit(attempt(f"stranger {strangers}", stranger, 30, sampling=KINDS[strangers % 4]))
        if source.random() < 0.4:
            backend.cancel(f"stranger {source.randint(0, strangers)}")
        found.run(backend, steps=1)
    assert {key: tokens for key, tokens in found.tokens.items() if "stranger" not in key[0]} == alone("gemma3").tokens
    blocks = backend.blocks()["tiny"]
    assert blocks.free == blocks.total


@pytest.mark.parametrize("index", range(ANSWER))
def test_a_request_resumed_at_any_index_goes_on_with_the_same_tokens(
    index: int, load: Load, alone: Callable[[str], Transcript]
) -> None:
    whole = alone("llama")
    another = load("llama", threads=2)
    for request in mixed():
        known = {choice: whole.tokens[request.request_id, choice][:index] for choice in range(request.choices)}
        another.admit(replace(request, resume=known))
    rest = Transcript(dict.fromkeys(whole.tokens, index)).run(another)
    assert rest.tokens == {key: tokens[index:] for key, tokens in whole.tokens.items()}
    assert logprobs(rest).items() <= logprobs(whole).items()


def test_a_choice_is_the_same_with_and_without_its_siblings(load: Load) -> None:
    backend = load("llama")
    [prompt] = prompts([70])
    options = Sampling(temperature=1.0, seed=9)
    backend.admit(attempt("all", prompt, ANSWER, sampling=options, choices=4))
    every = Transcript().run(backend).tokens
    assert len({tuple(tokens) for tokens in every.values()}) == 4
    backend.admit(attempt("one", prompt, ANSWER, sampling=options, choices=4, finished_choices=frozenset({0, 1, 3})))
    assert Transcript().run(backend).tokens == {("one", 2): every["all", 2]}


def served(backend: TorchBackend, folder: Path, plan: PrecisionPlan | None = None) -> dict[tuple[str, int], list[int]]:
    backend.load(ModelSpec("tiny", "1", folder, plan=plan), BUDGET)
    for number, prompt in enumerate(prompts((5, 70))):
        backend.admit(attempt(str(number), prompt, ANSWER))
    return Transcript().run(backend).tokens


def test_without_kernels_it_serves_in_fp32_and_says_so(
    folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    without = TorchBackend(threads=1, kernels_available=lambda: False)
    assert (without.precision, without.kernels) == ("fp32", False)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert torch_fingerprint(precision=without.precision) == torch_fingerprint() != torch_fingerprint(precision="auto")
    exact = served(TorchBackend(threads=1, precision="fp32"), folder("llama"), PLAN)
    assert served(without, folder("llama"), PLAN) == exact


def test_a_plan_is_followed_unless_another_precision_is_asked_for(
    load: Load, folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    planned = TorchBackend(threads=1)
    assert (planned.precision, planned.kernels) == ("auto", True)
    exact = served(TorchBackend(threads=1, precision="fp32"), folder("llama"), PLAN)
    assert served(planned, folder("llama"), PLAN) == served(load("llama"), folder("llama")) != exact
    for unplanned in (None, PrecisionPlan.uniform("fp32", 3)):
        assert served(planned, folder("llama"), unplanned) == exact
    assert caplog.records == []


def test_a_model_that_the_kernels_cannot_run_is_computed_by_torch(
    load: Load, written: Callable[[str], tuple[Path, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    gpt2 = written("gpt2")[0]
    backend = load("llama")
    caplog.clear()
    by_torch = TorchBackend(threads=1, precision="int8", kernels_available=lambda: False)
    assert (by_torch.precision, by_torch.kernels) == ("int8", False)
    assert torch_fingerprint(precision="int8", kernels=False) != torch_fingerprint(precision="int8")
    assert served(backend, gpt2) == served(by_torch, gpt2)
    warnings = [record.getMessage() for record in caplog.records if record.name == "worker.engine.loading"]
    assert len(warnings) == 2
    assert "GPT2LMHeadModel" in warnings[0]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_demand_covers_the_packed_model(family: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    if not kernels.available():
        pytest.skip(kernels.reason())
    files = model_files()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder(family) / name).write_bytes(files[name])
    import_model(Store(tmp_path), str(folder(family)), name="tiny", environ={})
    (exact,) = hold("torch", ("tiny",), tmp_path, "fp32")
    for kind, precision in ((Kind.INT8, "int8"), (Kind.FP16, "fp16")):
        (held,) = hold("torch", ("tiny",), tmp_path, precision)  # type: ignore[arg-type]
        decoder = fast_decoder(tiny.model(family), kind_of=lambda _, kind=kind: kind)  # type: ignore[misc]
        assert decoder.weight_bytes <= held.record.weight_bytes < exact.record.weight_bytes
        assert held.record.kv_bytes_per_token == 2 * sum(shape.numbers_per_token for shape in decoder.layers)
    for precision in ("int8", "fp16"):
        (torchs,) = hold("torch", ("tiny",), tmp_path, precision, lambda: False)  # type: ignore[arg-type]
        assert torchs.record.weight_bytes == exact.record.weight_bytes
        assert torchs.record.kv_bytes_per_token == exact.record.kv_bytes_per_token
    assert (FAMILIES, abi.GROUP, abi.HEAD_MULTIPLE) == (planning.FAMILIES, planning.GROUP, planning.HEAD_MULTIPLE)
