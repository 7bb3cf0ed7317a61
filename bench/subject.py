"""What the step loop's benchmarks run: the default model, its precision plan, prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

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
