"""What the step loop's benchmarks run: the default model, its precision plan, prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmos.store import Store, default_store_path, ensure_default
from llmos.store.planning import ensure_plan
from llmos.store.precision import PrecisionPlan

Prompts = Callable[[int, int], list[int]]
"""A prompt of so many tokens; the first number says which."""


def default_model() -> Path:
    """Folder of the store's default model."""
    store = Store(default_store_path())
    return store.materialize(ensure_default(store))


def plan_of(folder: Path) -> PrecisionPlan | None:
    """The plan of a model in the store, which names a folder by its version."""
    store = Store(default_store_path())
    record = ensure_plan(store, store.resolve(folder.name))
    return None if record is None else record.plan


def prompts_of(folder: Path) -> Prompts:
    """Pieces of the language reference, in a model's tokens."""
    from pydoc_data.topics import topics

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = [number for name in sorted(topics) for number in tokenizer(topics[name][:8000])["input_ids"]]

    def text(number: int, length: int) -> list[int]:
        first = number * 997 % (len(ids) - length)
        return ids[first : first + length]

    return text


def small_model(folder: Path) -> Path:
    """Two random layers under the default model's tokenizer, written to `folder`, which it returns.

    Many requests a second, and logits of the usual size.
    """
    original = default_model()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((original / name).read_bytes())
    config = AutoConfig.from_pretrained(original)
    config.update(
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 64,
        }
    )
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
