"""LoRA adapters that a worker can load: those in its store whose base, in the same version, is one of its models."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from llmos.errors import ConfigError, StoreCorrupt
from llmos.internal.v1 import registry_pb2, requests_pb2
from llmos.store import Manifest, Store
from llmos.store.precision import Precision, content_version, identity
from worker.engine_process import EngineModel
from worker.models import HeldModel, hold

log = logging.getLogger(__name__)

_FLOAT32_BYTES = 4
_RANK_MULTIPLE = 8


def hold_with_adapters(
    backend: str, names: Sequence[str], store: Path | None, precision: Precision, *, on_gpu: bool = False
) -> list[HeldModel]:
    """See `hold`; with all adapters to those models, named or not. Raises ConfigError for one without its base."""
    if backend == "echo":
        return hold(backend, names, store, precision)
    opened = Store(store)
    named = {name: entry.name for name in names if (entry := opened.resolve(name)).adapter is not None}
    models = [name for name in names if name not in named]
    bases = hold(backend, models, store, precision, on_gpu=on_gpu) if models or not names else []
    held = [*bases, *_hold(opened, _adapters(opened), bases)]
    if missing := set(named.values()) - {model.name for model in held}:
        raise ConfigError(
            f"{min(missing)} is an adapter: name its model, in the version that it was imported for", param="model"
        )
    return held


class AdapterWatch:
    """Adapters that come into the store while the worker runs. What goes, or changes its version, needs a restart."""

    def __init__(self, store: Store, held: Sequence[HeldModel]) -> None:
        self._store = store
        self._bases = [model for model in held if not model.engine.base]
        self._known = {model.name for model in held}

    def look(self) -> list[HeldModel]:
        """Those whose names were not there before. Reads the store's manifests."""
        fresh = [entry for entry in _adapters(self._store) if entry.name not in self._known]
        self._known.update(entry.name for entry in fresh)
        return list(_hold(self._store, fresh, self._bases))


def _hold(store: Store, entries: Iterable[Manifest], bases: Sequence[HeldModel]) -> Iterator[HeldModel]:
    """Those that belong to `bases`. Damaged ones are left out, and named in the log."""
    by_version = {content_version(base.engine.version): base for base in bases}
    for entry in entries:
        base = by_version.get(entry.adapter.base_version) if entry.adapter is not None else None
        if base is not None and store.whole(entry):
            yield _held(store, entry, base)
        elif base is not None:
            log.warning("the adapter %s is damaged: import it again", entry.name)


def _adapters(store: Store) -> list[Manifest]:
    try:
        return [entry for entry in store.list() if entry.name and entry.adapter is not None]
    except StoreCorrupt as error:
        log.warning("no adapters are served: %s", error.message)
        return []


def _held(store: Store, entry: Manifest, base: HeldModel) -> HeldModel:
    model = requests_pb2.CatalogueModel()
    model.CopyFrom(base.record.model)
    # Its bytes depend on the precision of its base.
    version = identity(entry.version, base.engine.plan)
    model.name, model.version, model.base_model = entry.name, version, base.name
    model.created_unix_s = entry.created_unix_s
    record = registry_pb2.ModelRecord(model=model, weight_bytes=_weight_bytes(entry))
    engine = EngineModel(
        name=entry.name,
        version=version,
        folder=str(store.materialize(entry)),
        weight_bytes=record.weight_bytes,
        base=base.name,
    )
    return HeldModel(record, engine)


def _weight_bytes(entry: Manifest) -> int:
    """At most: fp32, the rank padded."""
    rank = entry.adapter.rank if entry.adapter is not None else _RANK_MULTIPLE
    padded = -(-rank // _RANK_MULTIPLE) * _RANK_MULTIPLE
    return entry.parameter_count * padded // rank * _FLOAT32_BYTES
