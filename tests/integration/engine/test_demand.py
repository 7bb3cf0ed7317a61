"""What a model is predicted to take from the shapes in its files, against what its tensors take once it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmos.store import Manifest
from llmos.store.precision import Kind, PrecisionPlan
from tests.integration.engine_fast import tiny
from worker import demand, kernels
from worker.backend import ModelSpec
from worker.backends.torch import TorchBackend
from worker.engine.footprint import settled
from worker.engine.loading import load

CPU = torch.device("cpu")
VOCABULARY = 200_000
"""Large: what other tests left in this process's heap must not count beside it."""


def saved(family: str, folder: Path) -> Manifest:
    """A tiny model's folder, and the facts of it that demand is computed from."""
    model = tiny.model(family)
    model.save_pretrained(folder)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Manifest(
        architecture=type(model).__name__,
        model_type=config.model_type,
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        dtype="float32",
        parameter_count=0,
        weight_bytes=0,
        kv_bytes_per_token=8 * config.num_hidden_layers * config.num_key_value_heads * head_dim,
        tokenizer_hash="",
        files=(),
    )


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_in_fp32_it_is_near(family: str, tmp_path: Path) -> None:
    manifest = saved(family, tmp_path)
    loaded = load(tmp_path, CPU, precision="fp32")
    predicted = demand.in_fp32(manifest, demand.tensors_of(tmp_path)).weights
    assert predicted == pytest.approx(loaded.weight_bytes, rel=0.1)


@pytest.mark.skipif(not kernels.available(), reason="no kernels here")
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kind", ["int8", "fp16"])
def test_by_kernels_it_is_near(family: str, kind: Kind, tmp_path: Path) -> None:
    manifest = saved(family, tmp_path)
    loaded = load(tmp_path, CPU, precision=kind, kernels=True)
    plan = PrecisionPlan.uniform(kind, manifest.layers)
    predicted = demand.by_kernels(manifest, demand.tensors_of(tmp_path), plan)
    assert predicted.weights == pytest.approx(loaded.weight_bytes, rel=0.1)
    assert predicted.kv_per_token == manifest.kv_bytes_per_token // 2


def test_a_loaded_model_is_measured_and_gives_its_memory_back(tmp_path: Path) -> None:
    wide = tiny.config("llama")
    wide.vocab_size = VOCABULARY
    model = tiny.transformers.LlamaForCausalLM(wide)
    model.save_pretrained(tmp_path)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    del model
    backend = TorchBackend(threads=1, precision="fp32")
    spec = ModelSpec("m", "v", tmp_path)
    backend.load(spec, 1 << 29)
    backend.unload("m")
    before = settled()
    backend.load(spec, 1 << 29)
    taken = backend.footprint("m")
    assert taken.fixed - demand.workspace_bytes(VOCABULARY) == pytest.approx(weights, rel=0.1)
    backend.unload("m")
    assert backend.footprint("m").fixed == 0
    assert settled() - before < weights // 4
