"""Which files of a source are the model."""

from __future__ import annotations

import pytest

from llmos.errors import SourceError
from llmos.store.payload import Payload, bundle, model_name


def payloads(*names: str) -> list[Payload]:
    return [Payload(name, 1, lambda: iter([b"x"])) for name in names]


def test_safetensors_win_over_gguf_and_pickles_are_left_out() -> None:
    names = ["b.gguf", "model.safetensors", "config.json", "pytorch_model.bin", "README.md", "tokenizer.json"]
    chosen = bundle(payloads(*names), "It", "name")
    assert {payload.name for payload in chosen.payloads} == {"model.safetensors", "config.json", "tokenizer.json"}
    assert chosen.gguf is None
    assert chosen.name == "name"


def test_one_gguf_is_the_model_and_names_it() -> None:
    chosen = bundle(payloads("SmolLM2-135M-Instruct.Q4_1.gguf", "config.json"), "It", "package", "MIT")
    assert chosen.gguf is not None
    assert (chosen.name, chosen.license_id) == ("smollm2-135m-instruct", "MIT")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a.gguf", "b.gguf"], "2 GGUF files"),
        (["pytorch_model.bin", "config.json"], "pickle"),
        (["model.pt"], "pickle"),
        (["config.json"], "neither safetensors nor GGUF"),
        ([], "neither safetensors nor GGUF"),
        (["model.safetensors", "model.safetensors"], "several models"),
    ],
)
def test_an_unclear_choice_is_refused(names: list[str], says: str) -> None:
    with pytest.raises(SourceError, match=says):
        bundle(payloads(*names), "It", "name")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct"),
        ("gemma-3-270m-q4_k_m.gguf", "gemma-3-270m"),
        ("model-F16.gguf", "model"),
        ("phi.IQ2_XXS.gguf", "phi"),
        ("Qwen2.5-0.5B.gguf", "qwen2.5-0.5b"),
        ("odd name (1).gguf", "odd-name-1"),
        ("???.gguf", "model"),
    ],
)
def test_names_lose_suffix_and_quantization(file: str, name: str) -> None:
    assert model_name(file) == name


def test_promised_hashes_reach_their_files() -> None:
    chosen = bundle(payloads("a.gguf"), "It", "x").expecting({"a.gguf": "f" * 64, "other": "0" * 64})
    assert chosen.payloads[0].sha256 == "f" * 64
