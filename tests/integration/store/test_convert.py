"""The real converter on a tiny model: same logits, a tokenizer that stands alone, one version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from llmos.store import Manifest, Store, import_model
from tests.fakes.gguf_model import SPECIALS, tiny_llama, vocabulary, write_gguf
from tests.fakes.models import TEMPLATE
from tests.fakes.store import Recorder

pytestmark = pytest.mark.torch
PROMPT = torch.tensor([[5, 9, 2, 40, 7, 1]])


@pytest.fixture(scope="module")
def original() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    return tiny_llama()


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, original: LlamaForCausalLM) -> tuple[Store, Manifest, Recorder]:
    folder = tmp_path_factory.mktemp("convert")
    progress, store = Recorder(), Store(folder / "store")
    gguf = write_gguf(folder / "Tiny.F32.gguf", original)
    return store, import_model(store, str(gguf), progress=progress), progress


def test_the_converted_model_computes_the_same_logits(
    imported: tuple[Store, Manifest, Recorder], original: LlamaForCausalLM
) -> None:
    store, entry, _ = imported
    loaded = AutoModelForCausalLM.from_pretrained(store.materialize(entry), dtype=torch.float32)
    assert loaded.config.to_dict().get("quantization_config") is None
    with torch.no_grad():
        assert torch.equal(loaded(PROMPT).logits, original(PROMPT).logits)


def test_the_manifest_describes_it(imported: tuple[Store, Manifest, Recorder], original: LlamaForCausalLM) -> None:
    _, entry, progress = imported
    assert (entry.name, entry.architecture, entry.dtype) == ("tiny", "LlamaForCausalLM", "float32")
    assert (entry.layers, entry.kv_heads, entry.head_dim, entry.context_length) == (2, 2, 16, 256)
    assert entry.parameter_count == sum(parameter.numel() for parameter in original.parameters())
    assert entry.vocab_size == len(vocabulary())
    assert (entry.chat_template, entry.license) == (TEMPLATE, "mit")
    assert progress.complete()


def test_the_end_of_turn_that_the_template_writes_ends_generation(
    imported: tuple[Store, Manifest, Recorder],
) -> None:
    store, entry, _ = imported
    assert entry.eos_token_ids == (0, SPECIALS.index("<|im_end|>"))
    assert json.loads(store.read_file(entry, "generation_config.json"))["eos_token_id"] == [0, 2]
    assert (entry.bos_token, entry.eos_token) == ("<|im_start|>", "<|endoftext|>")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("<|im_start|>hell<|im_end|>", ["<|im_start|>", "he", "ll", "<|im_end|>"]),
        ("12", ["1", "2"]),
        ("a  1", ["a", "ĠĠ", "1"]),
        ("é", ["Ã", "©"]),
    ],
    ids=["specials stay whole, no BOS is added", "digits stand alone", "and are split off first", "bytes"],
)
def test_the_tokenizer_stands_alone(imported: tuple[Store, Manifest, Recorder], text: str, tokens: list[str]) -> None:
    store, entry, _ = imported
    tokenizer = Tokenizer.from_buffer(store.read_file(entry, "tokenizer.json"))
    encoded = tokenizer.encode(text)
    assert encoded.tokens == tokens
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    reference = AutoTokenizer.from_pretrained(store.materialize(entry))
    assert reference(text)["input_ids"] == encoded.ids


def test_nothing_of_this_machine_is_in_the_version(imported: tuple[Store, Manifest, Recorder]) -> None:
    store, entry, _ = imported
    for file in entry.files:
        if file.path.endswith(".json"):
            assert str(store.path.parent).encode() not in store.read_file(entry, file.path)


def test_quantized_weights_come_out_as_the_library_de_quantizes_them(
    tmp_path: Path, original: LlamaForCausalLM
) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize
    from safetensors import safe_open

    store = Store(tmp_path / "store")
    entry = import_model(store, str(write_gguf(tmp_path / "Tiny.Q8_0.gguf", original, quantized=True)))
    name = "model.layers.1.mlp.up_proj.weight"
    source = original.state_dict()[name].numpy()
    kind = GGMLQuantizationType.Q8_0
    expected = torch.from_numpy(dequantize(quantize(source, kind), kind))
    assert entry.dtype == "float32"
    with safe_open(store.materialize(entry) / "model.safetensors", "pt") as weights:
        assert torch.equal(weights.get_tensor(name), expected)
        assert not torch.equal(expected, original.state_dict()[name])
