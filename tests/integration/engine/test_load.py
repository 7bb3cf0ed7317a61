"""What is loaded, and what is refused instead of being served wrongly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from llmos.errors import ConfigError, LlmosError, SourceError, Unavailable, UnsupportedFeature
from tests.integration.engine.tiny import VOCABULARY, attempt
from worker.backend import ModelSpec
from worker.backends.torch import TorchBackend
from worker.engine.device import select_device

pytestmark = pytest.mark.torch

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def load(folder: Path | None, budget: int = 64 << 20, context: int = 0) -> TorchBackend:
    backend = TorchBackend(threads=1)
    backend.load(ModelSpec("tiny", "1", folder, context_length=context), budget)
    return backend


def saved(config: Any, folder: Path) -> Path:
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def copied(source: Path, target: Path) -> Path:
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as refused:
        load(tmp_path)
    assert str(tmp_path) not in refused.value.message
    with pytest.raises(SourceError):
        load(None)


def test_pickled_weights_are_refused(written: Callable[[str], tuple[Path, Any]], tmp_path: Path) -> None:
    folder = copied(written("llama")[0], tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SourceError):
        load(folder)


def test_damaged_weights_are_refused(written: Callable[[str], tuple[Path, Any]], tmp_path: Path) -> None:
    folder = copied(written("llama")[0], tmp_path)
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header at all")
    with pytest.raises(SourceError):
        load(folder)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_missing_weights_are_never_made_up(
    change: str, written: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    folder = copied(written("llama")[0], tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weight = weights.pop(name)
    if change == "shape":
        weights[name] = weight[:-1].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError):
        load(folder)


@pytest.mark.parametrize(
    "config",
    [
        transformers.MixtralConfig(**SMALL, num_local_experts=2),
        transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=2),
        transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=4),
    ],
    ids=lambda config: config.model_type,
)
def test_architectures_that_would_not_be_exact_are_refused(config: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeature):
        load(saved(config, tmp_path))


def test_a_length_dependent_rotation_limits_the_context(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "long_factor": [4.0] * 8,
        "short_factor": [1.0] * 8,
    }
    lengths = {"max_position_embeddings": 400, "original_max_position_embeddings": 100}
    config = transformers.Phi3Config(**SMALL, **lengths, rope_parameters=rope)
    backend = load(saved(config, tmp_path))
    assert context_of(backend) == 100


def test_the_declared_context_can_only_lower_the_models(written: Callable[[str], tuple[Path, Any]]) -> None:
    folder = written("llama")[0]
    assert [context_of(load(folder, context=context)) for context in (0, 64, 100_000)] == [512, 64, 512]


def context_of(backend: TorchBackend) -> int:
    with pytest.raises(LlmosError) as refused:
        backend.admit(attempt("a", [1], 1_000_000))
    return int(refused.value.message.split("context of ")[1].split()[0])


def test_the_budget_decides_the_blocks(written: Callable[[str], tuple[Path, Any]]) -> None:
    folder = written("llama")[0]
    totals = [load(folder, budget << 20).blocks()["tiny"].total for budget in (64, 128)]
    # Two layers, two heads of 12, keys and values, four bytes, 64 tokens.
    assert abs(totals[1] - totals[0] - (64 << 20) / (2 * 2 * 12 * 2 * 4 * 64)) < 1
    with pytest.raises(Unavailable):
        load(folder, 1 << 20)


def test_devices_by_name() -> None:
    assert select_device("cpu").type == "cpu"
    assert select_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ConfigError):
        select_device("abacus")
