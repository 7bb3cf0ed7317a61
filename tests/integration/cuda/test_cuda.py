"""On CUDA: near transformers, and the same bits alone, in any batch, beside adapters, and resumed anywhere."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmos.store.precision import Precision
from tests.fakes.adapters import RandomAdapter
from tests.integration.engine import tiny
from tests.integration.engine.test_exactness import ANSWER, mixed, run_alone
from tests.integration.engine.tiny import FAMILIES, Transcript, attempt, logprobs, prompts
from worker.backend import ModelSpec, Sampling
from worker.backends.torch import TorchBackend
from worker.engine.cuda.step import MAX_ROWS
from worker.engine.drawing import Draw, draw
from worker.engine.engine import EngineOptions
from worker.engine.loading import cuda_dtype
from worker.fingerprint import torch_fingerprint

pytestmark = [pytest.mark.torch, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

BUDGET = 2 << 30
PRECISIONS: tuple[Precision, ...] = ("auto", "fp16", "fp32")
Model = tuple[Path, Any]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Folder and transformers' model of a family; written once."""
    found: dict[str, Model] = {}

    def of(family: str) -> Model:
        if family not in found:
            folder = tmp_path_factory.mktemp(family)
            found[family] = folder, tiny.write(family, folder)
        return found[family]

    return of


@pytest.fixture
def loaded(written: Callable[[str], Model]) -> Iterator[Callable[..., TorchBackend]]:
    """A backend on CUDA that has loaded a family as `tiny`."""

    def of(family: str, precision: Precision = "auto", options: EngineOptions | None = None) -> TorchBackend:
        backend = TorchBackend(threads=1, device="cuda", precision=precision, options=options)
        backend.load(ModelSpec("tiny", "1", written(family)[0]), BUDGET)
        return backend

    yield of
    torch.cuda.empty_cache()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_as_near_to_exact_numbers_as_transformers_is(
    family: str, precision: Precision, loaded: Callable[..., TorchBackend], written: Callable[[str], Model]
) -> None:
    backend, (folder, reference) = loaded(family, precision), written(family)
    asked = prompts((1, 7, 24, 25, 63, 64, 65, 127, 128, 129, 200, 300, 400))
    for number, prompt in enumerate(asked):
        backend.admit(attempt(str(number), prompt, ANSWER, sampling=Sampling(temperature=0, logprobs=0)))
    found = Transcript().run(backend)
    assert found.failures == []
    told: Any = logprobs(found)
    double = copy.deepcopy(reference).double()
    double.set_attn_implementation("eager")
    same = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=cuda_dtype(precision), attn_implementation="eager"
    ).cuda()
    ours, theirs = [], []
    for number, prompt in enumerate(asked):
        tokens = found.tokens[str(number), 0]
        exact = likely(double, prompt, tokens)
        said = torch.tensor([told[str(number), 0, index].logprob for index in range(len(tokens))])
        ours.append((said - exact).abs())
        theirs.append((likely(same, prompt, tokens) - exact).abs())
    assert torch.cat(ours).mean() < 1.5 * torch.cat(theirs).mean() + 1e-5


def likely(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Log probabilities of an answer's tokens by transformers."""
    ids = torch.tensor([[*prompt, *tokens[:-1]]], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 :]
    picked: Tensor = logits.double().log_softmax(-1).cpu()[torch.arange(len(tokens)), list(tokens)]
    return picked


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_is_the_same_alone_among_others_and_resumed(
    family: str, precision: Precision, loaded: Callable[..., TorchBackend]
) -> None:
    expected = run_alone(loaded(family, precision), mixed())
    backend, order = loaded(family, precision), mixed()
    random.Random(1).shuffle(order)
    for request in order:
        backend.admit(request)
    together = Transcript().run(backend)
    assert together.tokens == expected.tokens
    assert logprobs(together) == logprobs(expected)
    source, resumed = random.Random(2), dict[tuple[str, int], int]()
    for request in order:
        keys = [(request.request_id, choice) for choice in range(request.choices)]
        resumed.update((key, source.randrange(ANSWER)) for key in keys)
        known = {choice: expected.tokens[key][: resumed[key]] for choice, key in enumerate(keys)}
        backend.admit(replace(request, resume=known))
    rest = Transcript(resumed).run(backend)
    assert rest.tokens == {key: tokens[resumed[key] :] for key, tokens in expected.tokens.items()}
    assert logprobs(rest).items() <= logprobs(expected).items()


def test_more_rows_than_a_pass_has_change_nothing(
    loaded: Callable[..., TorchBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        attempt(str(number), prompt, 4, sampling=Sampling(temperature=1.0, seed=number), choices=8)
        for number, prompt in enumerate(prompts([70] * 40, seed=3))
    ]
    expected = run_alone(loaded("llama"), requests)
    backend, passes = loaded("llama", options=EngineOptions(max_running=512)), list[tuple[int, int]]()

    def counted(decoder: PagedCudaDecoder, tokens: Any, positions: Any, rows: Any, wanted: Any, *rest: Any) -> Tensor:
        passes.append((len(tokens), len(wanted)))
        return forward(decoder, tokens, positions, rows, wanted, *rest)

    from worker.engine.cuda.decoder import PagedCudaDecoder

    forward = PagedCudaDecoder.forward
    monkeypatch.setattr(PagedCudaDecoder, "forward", counted)
    for request in requests:
        backend.admit(request)
    assert Transcript().run(backend).tokens == expected.tokens
    assert max(passes)[0] > MAX_ROWS
    assert max(wanted for _, wanted in passes) > MAX_ROWS


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_adapters_change_their_own_rows_only(
    precision: Precision, loaded: Callable[..., TorchBackend], written: Callable[[str], Model], tmp_path: Path
) -> None:
    made = [RandomAdapter.of(written("llama")[1], number, rank=2 + number) for number in range(3)]
    backend = loaded("llama", precision)
    asked = [
        attempt(f"{number}", prompt, ANSWER, sampling=Sampling(temperature=0.8, seed=number, logprobs=0))
        for number, prompt in enumerate(prompts([20, 64, 90, 130] * 4, seed=6))
    ]
    plain = run_alone(backend, asked)
    for number, adapter in enumerate(made):
        adapter.write(tmp_path / str(number))
        backend.load(ModelSpec(f"a{number}", "1", tmp_path / str(number), base="tiny"), 0)
    names = ["", "a0", "a1", "a2"]
    mixture = [replace(request, adapter=names[number % 4]) for number, request in enumerate(asked)]
    expected = run_alone(backend, mixture)
    for request in mixture:
        backend.admit(request)
    together = Transcript().run(backend)
    assert (together.tokens, logprobs(together)) == (expected.tokens, logprobs(expected))
    for number in range(len(asked)):
        same = together.tokens[str(number), 0] == plain.tokens[str(number), 0]
        assert same == (number % 4 == 0)


def test_the_fingerprint_names_the_processor_and_the_numbers() -> None:
    device = torch.device("cuda")
    found = {torch_fingerprint(device, precision) for precision in PRECISIONS} | {torch_fingerprint()}
    assert len(found) == 4
    assert torch.cuda.get_device_name(device) in torch_fingerprint(device, "auto")


def test_draws_are_those_of_the_main_processor() -> None:
    source = torch.Generator().manual_seed(4)
    logits = torch.randn(6, 49_157, generator=source) * 4
    for index in range(40):
        rows = [
            Draw(0.3 + 0.2 * number, 50 * (number % 2), 1.0 - 0.1 * (number // 3), -math.inf, seed, number, index)
            for number, seed in enumerate((0, 1, 2**63, 2**64 - 1, 7, 123_456_789_012))
        ]
        assert draw(logits.cuda(), rows) == draw(logits, rows)


class TwiceRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    """Looks like one that is known."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice of it."""
        return 2 * super().forward(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [16, 48, 576, 4096])
def test_norms_are_replaced_by_equal_ones_only(dtype: torch.dtype, size: int) -> None:
    from worker.engine.cuda.norms import fuse_norms

    model: Any = nn.ModuleList([LlamaRMSNorm(size), Gemma3RMSNorm(size), TwiceRMSNorm(size)])
    for number, norm in enumerate(model):
        nn.init.normal_(norm.weight, mean=1.0 - number % 2, std=0.2)
    model = model.to("cuda", dtype)
    before = list(model)
    rows = torch.randn(192, size, device="cuda", dtype=dtype) * 3
    assert fuse_norms(model) == 2
    for old, new in zip(before, model, strict=True):
        assert torch.allclose(old(rows), new(rows), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5)
        if old is not new:
            assert all(torch.equal(new(rows[:count]), new(rows)[:count]) for count in (1, 2, 7, 64, 65, 128))
