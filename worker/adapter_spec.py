"""The engine process's look into the store, for an adapter that was imported after the process had begun."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llmos.errors import ModelNotFound, StoreCorrupt
from llmos.internal.v1 import work_pb2
from llmos.store import Store
from llmos.store.precision import content_version
from worker.backend import ModelSpec


def adapter_spec(store: Path | None, models: Iterable[ModelSpec], order: work_pb2.LoadModel) -> ModelSpec | None:
    """What is to be loaded; None if the store has no such adapter to one of `models`."""
    opened = Store(store)
    try:
        entry = opened.resolve(content_version(order.version))
    except (ModelNotFound, StoreCorrupt):
        return None
    if entry.adapter is None:
        return None
    wanted = entry.adapter.base_version
    base = next((model.name for model in models if content_version(model.version) == wanted), "")
    return ModelSpec(order.model, order.version, opened.materialize(entry), base=base) if base else None
