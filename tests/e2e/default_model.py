"""The embedded default model, imported once per machine into the user's store."""

from __future__ import annotations

import functools
from pathlib import Path

from llmos.store import Store, default_store_path, ensure_default


@functools.cache
def default_model() -> tuple[str, Path]:
    """(name, folder with safetensors, tokenizer and config)."""
    store = Store(default_store_path())
    manifest = ensure_default(store)
    return manifest.name, store.materialize(manifest)
