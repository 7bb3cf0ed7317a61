"""Models that can be asked for: which version each name points at, and what gateways must know of it."""

from __future__ import annotations

from collections.abc import Callable, Collection

from llmos.internal.v1 import requests_pb2
from scheduler.workers import HOPELESS, LOADED, WorkerView


class Catalogue:
    """Names enter when a worker has loaded them and leave some time after the last worker that could serve them.

    An adapter's enters when its base is loaded: it is loaded itself once somebody asks for it.
    """

    def __init__(self) -> None:
        self.revision = 0
        self.loading = True
        """There is no model, and it is a matter of time."""
        self._models: dict[str, requests_pb2.CatalogueModel] = {}
        self._missing_since: dict[str, float] = {}

    def get(self, name: str) -> requests_pb2.CatalogueModel | None:
        """What `name` points at."""
        return self._models.get(name)

    def refresh(
        self,
        workers: Collection[WorkerView],
        now: float,
        grace_s: float,
        promised: Callable[[str, str], object] = lambda model, pool: None,
        *,
        listed: bool = True,
    ) -> bool:
        """Take the workers' models into account; whether anything changed for gateways.

        `promised` says whether a pool will load a model on request: then it is offered while it is loaded nowhere.
        Until all promises are `listed`, nothing is loaded.

        A name keeps its version as long as any worker has that loaded; then the newest loaded one takes its place.
        """
        loaded, possible = _offered(workers, promised)
        changed = False
        for name, versions in loaded.items():
            known = self._models.get(name)
            if known is None or known.version not in versions:
                newest = max(versions.values(), key=lambda model: (model.created_unix_s, model.version))
                self._models[name] = newest
                changed = True
        for name in list(self._models):
            if name in possible:
                self._missing_since.pop(name, None)
            elif now - self._missing_since.setdefault(name, now) >= grace_s:
                del self._models[name], self._missing_since[name]
                changed = True
        loading = not self._models and (not listed or _may_load(workers))
        changed = changed or loading != self.loading
        self.loading = loading
        self.revision += changed
        return changed

    def message(self) -> requests_pb2.Catalogue:
        """As gateways get it, in order of name."""
        return requests_pb2.Catalogue(
            revision=self.revision, models=[self._models[name] for name in sorted(self._models)], loading=self.loading
        )


def _may_load(workers: Collection[WorkerView]) -> bool:
    """Whether one of them may come to serve something by itself; so may the first one, if there is none yet."""
    return not workers or any(not worker.connected or worker.loading for worker in workers)


def _offered(
    workers: Collection[WorkerView], promised: Callable[[str, str], object]
) -> tuple[dict[str, dict[str, requests_pb2.CatalogueModel]], set[str]]:
    """Loaded versions by name, and names that a connected worker serves or may come to serve."""
    loaded: dict[str, dict[str, requests_pb2.CatalogueModel]] = {}
    possible: set[str] = set()
    for worker in workers:
        if not worker.connected:
            continue
        for slot in worker.slots.values():
            name, version = slot.key
            if slot.state in HOPELESS:
                continue
            possible.add(name)
            base = worker.slots.get(slot.base)
            ready = slot.state == LOADED or (base is not None and base.state == LOADED)
            if ready or promised(slot.base or name, worker.record.pool):
                loaded.setdefault(name, {})[version] = slot.record.model
    return loaded, possible
