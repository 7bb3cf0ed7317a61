"""The embedded default, for real: imported once per machine, answers a question, stops at the end of its turn."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmos.store import DEFAULT_NAME, Manifest, Store, ensure_default
from tests.fakes.store import Recorder

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(600)]
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def store() -> Store:
    """The user's own, so that the conversion happens once per machine and not once per run."""
    return Store()


@pytest.fixture(scope="module")
def entry(store: Store) -> Manifest:
    return ensure_default(store)


def test_it_is_there_at_once_the_second_time(store: Store, entry: Manifest) -> None:
    progress = Recorder()
    assert ensure_default(store, progress) == entry
    assert progress.stages == []


def test_it_is_whole_and_what_it_says(store: Store, entry: Manifest) -> None:
    store.verify(entry)
    assert (entry.name, entry.architecture, entry.dtype) == (DEFAULT_NAME, "LlamaForCausalLM", "float32")
    assert (entry.layers, entry.kv_heads, entry.head_dim, entry.vocab_size) == (30, 3, 64, 49152)
    assert (entry.context_length, entry.parameter_count) == (8192, 134_515_008)
    assert entry.kv_bytes_per_token == 2 * 30 * 3 * 64 * 4
    assert "<|im_start|>" in entry.chat_template
    assert entry.license == "Apache-2.0"


def test_its_tokenizer_needs_nothing_but_tokenizers(store: Store, entry: Manifest) -> None:
    alone = Tokenizer.from_buffer(store.read_file(entry, "tokenizer.json"))
    reference = AutoTokenizer.from_pretrained(store.materialize(entry))
    text = reference.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert alone.encode(text).ids == reference(text)["input_ids"]
    assert alone.decode(alone.encode(text).ids, skip_special_tokens=False) == text
    assert alone.token_to_id("<|im_end|>") in entry.eos_token_ids
    assert alone.encode("a  12").tokens == ["a", "ĠĠ", "1", "2"]
    assert json.loads(store.read_file(entry, "config.json"))["vocab_size"] == alone.get_vocab_size()


def test_it_answers_and_ends_its_turn(store: Store, entry: Manifest) -> None:
    torch.set_num_threads(1)
    folder = store.materialize(entry)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        generated = model.generate(**prompt, do_sample=False, max_new_tokens=48)
    answer = generated[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert int(answer[-1]) in entry.eos_token_ids
