"""LoRA adapters in the store: which are taken in, what is known of them, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from llmos.cli.models import app
from llmos.errors import SourceError
from llmos.store import Manifest, Store, import_model
from llmos.store.adapter import place, projection, read_config
from tests.fakes.models import LINEARS, safetensors, write_base, write_model, write_peft


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    import_model(store, str(write_base(tmp_path / "Base")), environ={})
    return store


def imported(store: Store, folder: Path, **options: Any) -> Manifest:
    return import_model(store, str(folder), environ={}, **options)


def test_an_adapter_is_a_version_with_a_base(store: Store, tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "Tone", "base")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"")
    entry, base = imported(store, folder), store.resolve("base")
    assert entry.name == "tone"
    assert entry.adapter is not None
    assert (entry.adapter.base_version, entry.adapter.rank) == (base.version, 2)
    assert entry.adapter.targets == ("q_proj", "v_proj", "down_proj")
    assert (entry.tokenizer_hash, entry.context_length) == (base.tokenizer_hash, base.context_length)
    assert entry.kv_bytes_per_token == 0
    assert entry.weight_bytes == sum(4 * 2 * sum(LINEARS[name]) for name in entry.adapter.targets)
    assert [file.path for file in entry.files] == ["adapter_config.json", "adapter_model.safetensors"]
    store.verify(entry)
    assert imported(store, folder, name="again", base=base.version[:12]).version == entry.version


def test_a_model_keeps_the_version_that_it_had_before_there_were_adapters(store: Store, tmp_path: Path) -> None:
    assert imported(store, write_model(tmp_path / "plain")).version.startswith("fc86213cb2fa4f0f")


@pytest.mark.parametrize("named", ["Base", "someone/Base", "/home/someone/Base", "base"])
def test_its_base_is_found_by_the_name_that_it_gives(store: Store, tmp_path: Path, named: str) -> None:
    entry = imported(store, write_peft(tmp_path / "tone", named))
    assert entry.adapter is not None
    assert entry.adapter.base_version == store.resolve("base").version


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "LORA"),
        ({"r": 65}, "rank"),
        ({"r": 0}, "rank"),
        ({"r": True}, "rank"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"bias": "all"}, "biases"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "other weights"),
        ({"base_model_name_or_path": "nobody"}, "no model nobody"),
        ({"base_model_name_or_path": None}, "--base"),
        ({"r": 3}, "do not fit"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_more_than_lora_is_refused(store: Store, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(SourceError, match=said):
        imported(store, write_peft(tmp_path / "tone", "base", **change))
    assert [entry.name for entry in store.list()] == ["base"]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"layers.0.self_attn.q_proj.lora_A.weight": (2, 16)}, "do not fit"),
        (
            {"layers.0.self_attn.q_proj.lora_A.weight": (2, 8), "layers.0.self_attn.q_proj.lora_B.weight": (16, 2)},
            "fit",
        ),
        ({"layers.9.self_attn.q_proj.lora_A.weight": (2, 16)}, "does not have"),
        ({"layers.0.self_attn.q_proj.lora_magnitude_vector": (16,)}, "no LoRA matrix"),
        ({"embed_tokens.lora_embedding_A": (2, 32)}, "no LoRA matrix"),
        ({}, "no weights"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    store: Store, tmp_path: Path, tensors: dict[str, tuple[int, ...]], said: str
) -> None:
    folder = write_peft(tmp_path / "tone", "base")
    named = {f"base_model.model.model.{name}": shape for name, shape in tensors.items()}
    (folder / "adapter_model.safetensors").write_bytes(safetensors(named))
    with pytest.raises(SourceError, match=said):
        imported(store, folder)


def test_an_adapter_has_no_adapters_and_a_model_no_base(store: Store, tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "tone", "base")
    imported(store, folder)
    with pytest.raises(SourceError, match="is an adapter itself"):
        imported(store, folder, base="tone")
    with pytest.raises(SourceError, match="only adapters have a base"):
        imported(store, write_model(tmp_path / "other"), base="base")
    with pytest.raises(SourceError, match="no model nobody"):
        imported(store, folder, base="nobody")


def test_half_an_adapter_is_refused(store: Store, tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "tone", "base")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(SourceError, match=r"no adapter_config\.json"):
        imported(store, folder)
    both = write_peft(write_base(tmp_path / "both"), "base")
    with pytest.raises(SourceError, match="folders of their own"):
        imported(store, both)
    pickled = write_peft(tmp_path / "pickled", "base")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(SourceError, match="pickle"):
        imported(store, pickled)


def test_a_merged_model_that_kept_the_config_of_its_adapter_is_a_model(store: Store, tmp_path: Path) -> None:
    folder = write_base(tmp_path / "merged")
    (folder / "adapter_config.json").write_text("{}")
    assert imported(store, folder).version == store.resolve("base").version


def test_scale_and_places() -> None:
    assert projection("model.layers.11.mlp.down_proj") == (11, "down_proj")
    assert projection("model.layers.11.mlp.down_proj.inner") is None
    assert projection("model.embed_tokens") is None
    assert place("base_model.model.model.layers.3.self_attn.o_proj.lora_B.weight") == (3, "o_proj", False)


@pytest.mark.parametrize(("stabilized", "scale"), [(False, 2.0), (True, 2.0 * 2**0.5)])
def test_the_scale_is_alpha_over_rank_or_its_root(tmp_path: Path, stabilized: bool, scale: float) -> None:
    assert read_config(write_peft(tmp_path, "base", use_rslora=stabilized)).scale == pytest.approx(scale)


def test_the_command_shows_what_an_adapter_belongs_to(store: Store, tmp_path: Path) -> None:
    folder, where = str(write_peft(tmp_path / "tone", "nobody")), ["--store", str(store.path)]

    def run(*arguments: str) -> str:
        return str(CliRunner().invoke(app, [*arguments, *where], catch_exceptions=False).stdout)

    assert "tone is version" in run("import", folder, "--base", "base")
    assert "adapter of base" in run("ls")
    assert "q_proj, v_proj, down_proj" in run("show", "tone")
    listed = {entry["name"]: entry for entry in json.loads(run("ls", "--json"))}
    assert (listed["tone"]["kind"], listed["base"]["kind"]) == ("adapter", "model")
    assert listed["tone"]["base_version"] == listed["base"]["version"]
    assert msgspec.json.decode(run("show", "tone", "--json"))["adapter"]["rank"] == 2
