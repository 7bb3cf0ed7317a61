"""Plans of precisions: the same on both paths, chosen within a bound, measured by a child process of the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor

from llmos.store import Store, import_model
from llmos.store.planning import ensure_plan
from llmos.store.precision import HEAD, PrecisionPlan, identity
from tests.fakes.store import Recorder
from tests.integration.engine_fast import tiny
from worker import kernels
from worker.engine import attention
from worker.engine import model as general
from worker.engine.fast import fast_decoder, packing
from worker.engine.grouped import GroupedLinear, restored
from worker.engine.loading import load
from worker.engine.paged import Servable
from worker.engine.planned import matrix_of, round_weights
from worker.models import hold
from worker.precision import Measurement, planned
from worker.quality.distance import distance, of_decoder, of_transformers
from worker.quality.search import Bound

pytestmark = pytest.mark.torch
LAYERS = 3
INT8 = PrecisionPlan.uniform("int8", LAYERS)
MIXED = INT8.changed({"head": "fp16", "layers.1.qkv": "fp16", "layers.2.down": "fp32", "layers.0.gate_up": "fp16"})
KL_BOUND = 2e-6
"""Nats per token between the two paths in the same plan, keys and values in fp16 on one and fp32 on the other."""
LOGIT_BOUND = 5e-4
"""Difference of any logit, in parts of the largest one, with keys and values in fp32 on both."""


@pytest.fixture(autouse=True)
def compiled() -> None:
    """Without a compiler there is no second path to compare with."""
    if not kernels.available():
        pytest.skip(kernels.reason())
    torch.set_num_threads(1)


def on_general_path(model: Any, plan: PrecisionPlan) -> Servable:
    attention.register()
    model.set_attn_implementation(attention.IMPLEMENTATION)
    return general.prepare(model, torch.device("cpu"), plan=plan)


@torch.inference_mode()
def logits(decoder: Servable, tokens: Sequence[int]) -> Tensor:
    return torch.cat(list(of_decoder(decoder)(tokens)))


@pytest.mark.parametrize("plan", [INT8, PrecisionPlan.uniform("fp16", LAYERS), MIXED], ids=["int8", "fp16", "mixed"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_both_paths_compute_a_plan_within_the_bound(family: str, plan: PrecisionPlan) -> None:
    text = tiny.text(150)
    by_torch = on_general_path(tiny.model(family), plan)
    exact_kv, half_kv = (
        fast_decoder(tiny.model(family), kv_dtype=dtype, kind_of=packing.planned(plan))
        for dtype in (torch.float32, torch.float16)
    )
    expected = logits(by_torch, text)
    assert float((logits(exact_kv, text) - expected).abs().max()) <= LOGIT_BOUND * float(expected.abs().max())
    found = distance(of_decoder(by_torch), of_decoder(half_kv), [text])
    assert found.kl <= KL_BOUND
    # Which is far less than what the plan itself costs, so that a matrix in the wrong precision would show.
    assert distance(of_transformers(tiny.model(family)), of_decoder(by_torch), [text]).kl > found.kl


def test_int8_products_have_the_kernels_bits() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, x = torch.randn(150, 192, generator=generator), torch.randn(9, 192, generator=generator)
    weight[7], x[4] = 0, 0
    loaded = kernels.load()
    packed = loaded.pack(weight)
    assert torch.equal(loaded.unpack(packed), restored(weight))
    linear = GroupedLinear(weight, None)
    together = linear(x)
    assert torch.equal(loaded.product(packed, x), together)
    assert torch.equal(torch.cat([linear(row[None]) for row in x]), together)
    x[2, 5], x[6, 9] = float("nan"), float("inf")
    assert linear(x).isnan().all(dim=1).tolist() == [row in (2, 6) for row in range(9)]


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_any_decoder_runs_a_plan(family: str, written: Callable[[str], tuple[Path, Any]]) -> None:
    folder, reference = written(family)
    text = tiny.text(100)
    served = load(folder, torch.device("cpu"), precision="int8", kernels=True)
    rounded = general.read(folder, torch.device("cpu"))
    rounded.set_attn_implementation("eager")
    round_weights(rounded, PrecisionPlan.uniform("int8", rounded.config.num_hidden_layers))
    # int16 activations cost next to nothing beside int8 weights.
    assert distance(of_transformers(rounded), of_decoder(served), [text]).kl < 1e-6
    assert distance(of_transformers(reference), of_decoder(served), [text]).kl > 1e-5


@pytest.mark.parametrize(
    ("module", "matrix"),
    [
        ("model.layers.11.self_attn.k_proj", "layers.11.qkv"),
        ("model.layers.0.self_attn.o_proj", "layers.0.out"),
        ("transformer.h.2.attn.c_attn", "layers.2.qkv"),
        ("transformer.h.2.attn.c_proj", "layers.2.out"),
        ("transformer.h.2.mlp.c_proj", "layers.2.down"),
        ("gpt_neox.layers.3.attention.dense", "layers.3.out"),
        ("lm_head", None),
        ("model.layers.1.mlp.router", None),
    ],
)
def test_modules_by_name(module: str, matrix: str | None) -> None:
    assert matrix_of(module) == matrix


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_weights_in_half_precision_are_packed_as_they_are_stored(family: str, tmp_path: Path) -> None:
    tiny.model(family).bfloat16().save_pretrained(tmp_path)
    packed = load(tmp_path, torch.device("cpu"), plan=INT8, kernels=True)
    wide = fast_decoder(general.read(tmp_path, torch.device("cpu")))
    assert torch.equal(logits(packed, tiny.text(70)), logits(wide, tiny.text(70)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that reads single characters."""
    made = tmp_path_factory.mktemp("planned")
    tiny.model("llama").save_pretrained(made)
    characters = {chr(32 + number): number for number in range(95)} | {"?unknown?": 95}
    tokenizer = Tokenizer(models.WordLevel(characters, unk_token="?unknown?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.save(str(made / "tokenizer.json"))
    return made


def test_the_ranking_foretells_what_int8_costs(folder: Path) -> None:
    work = Measurement(folder)
    ranked = work.rank()
    assert set(ranked) == {name for name, _ in INT8.matrices()}
    positions = min(256, work.tokens)
    foretold = sum(matrix.share for matrix in ranked.values()) / positions
    assert foretold == pytest.approx(work.measure(INT8).kl, rel=0.5)
    alone = PrecisionPlan.uniform("fp32", LAYERS).changed({HEAD: "int8"})
    # Head and embedding err independently in the estimate only.
    assert 0.4 < ranked[HEAD].share / positions / work.measure(alone).kl < 2.5


def test_a_tighter_bound_promotes_some_matrices_and_holds(folder: Path) -> None:
    free = planned(folder, "v", Bound(kl=1.0, perplexity=1.0))
    assert free.plan == INT8
    assert free.measured is not None
    bound = Bound(kl=free.measured.kl / 3, perplexity=1.0)
    tight = planned(folder, "v", bound)
    assert tight.measured is not None
    assert tight.measured.kl <= bound.kl
    assert {kind for _, kind in tight.plan.matrices()} == {"int8", "fp16"}
    assert tight.measured.weight_bytes > free.measured.weight_bytes
    hopeless = planned(folder, "v", Bound(kl=0.0))
    assert hopeless.plan.exact
    assert hopeless.reason


def test_the_store_measures_a_version_once_and_workers_serve_it_by_its_plan(folder: Path, tmp_path: Path) -> None:
    store, progress = Store(tmp_path), Recorder()
    entry = import_model(store, str(folder), name="tiny", environ={})
    record = ensure_plan(store, entry, progress)
    assert record is not None
    assert record.measured is not None
    assert progress.complete()
    (held,) = hold("torch", ("tiny",), tmp_path)
    assert (held.engine.plan, held.engine.version) == (record.plan, identity(entry.version, record.plan))
    assert held.record.model.version == held.engine.version != entry.version
    decoder = load(Path(held.engine.folder), torch.device("cpu"), plan=record.plan, kernels=True)
    assert decoder.weight_bytes == held.record.weight_bytes == record.measured.weight_bytes
    (exact,) = hold("torch", ("tiny",), tmp_path, "fp32")
    assert exact.engine.version == held.engine.version
