"""State of a worker's models: what it holds, what it was ordered to load, what the engine says. Pure; one owner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from llmos.internal.v1 import work_pb2
from llmos.v1 import fleet_pb2
from worker.models import HeldModel

AVAILABLE, LOADING = fleet_pb2.MODEL_STATE_AVAILABLE, fleet_pb2.MODEL_STATE_LOADING
LOADED, FAILED, UNFIT = fleet_pb2.MODEL_STATE_LOADED, fleet_pb2.MODEL_STATE_FAILED, fleet_pb2.MODEL_STATE_UNFIT
UNLOADING = fleet_pb2.MODEL_STATE_UNLOADING
_ENGINES_PER_LOAD = 3
"""Engine processes that may end while they load a model. It is then given up, or the others would never be served."""


class Shelf:
    """Models by name. Orders to load outlive the engine process that carries them out."""

    def __init__(self, held: Sequence[HeldModel], capacity: fleet_pb2.Capacity) -> None:
        self._held = {model.name: model for model in held}
        self._largest = max((device.memory_bytes for device in capacity.devices), default=0)
        self._states = {model.name: self._initial(model) for model in held}
        self._orders: dict[str, work_pb2.LoadModel] = {}
        self._ended: Counter[str] = Counter()
        """Engines that ended while they loaded a model, since it was last ordered or loaded."""
        self._changed: set[str] = set()

    def add(self, held: Sequence[HeldModel]) -> None:
        """Hold more models."""
        for model in held:
            self._held[model.name] = model
            self._states[model.name] = self._initial(model)
            self._changed.add(model.name)

    @property
    def changed(self) -> bool:
        """Whether a state has changed since `take_changes`."""
        return bool(self._changed)

    @property
    def orders(self) -> Iterable[work_pb2.LoadModel]:
        """What a fresh engine process has to load."""
        return self._orders.values()

    def loaded(self, name: str) -> bool:
        """Whether attempts at this model can be computed now."""
        state = self._states.get(name)
        return state is not None and state.state == LOADED

    def ordered(self, name: str) -> bool:
        """Whether the model is, or will be, loaded."""
        return name in self._orders

    def all(self) -> list[fleet_pb2.NodeModel]:
        """Every model; `take_changes` begins from here."""
        self._changed.clear()
        return list(self._states.values())

    def take_changes(self) -> list[fleet_pb2.NodeModel]:
        """Models that changed since the last call."""
        names, self._changed = self._changed, set()
        return [self._states[name] for name in sorted(names)]

    def order(self, order: work_pb2.LoadModel) -> work_pb2.LoadModel | None:
        """Take an order to load. Returns what the engine has to do, None if nothing."""
        held, state = self._held.get(order.model), self._states.get(order.model)
        if held is None or state is None:
            return None
        if state.state in (LOADING, LOADED, UNFIT):
            self._changed.add(order.model)
            return None
        if order.version not in ("", held.engine.version):
            self._set(order.model, FAILED, detail=f"This worker holds version {held.engine.version[:12]}.")
            return None
        if held.engine.base and held.engine.base not in self._orders:
            self._set(order.model, FAILED, detail=f"Its base, {held.engine.base}, is not loaded here.")
            return None
        complete = work_pb2.LoadModel()
        complete.CopyFrom(order)
        complete.memory_budget_bytes = order.memory_budget_bytes or self._largest
        self._orders[order.model] = complete
        self._ended.pop(order.model, None)
        self._set(order.model, LOADING)
        return complete

    def unload(self, name: str, *, in_engine: bool = True) -> None:
        """Take an order to unload a model with its adapters. Its memory is free once the engine says so."""
        adapters = [model.name for model in self._held.values() if model.engine.base == name]
        for gone in (name, *(adapter for adapter in adapters if adapter in self._orders)):
            order = self._orders.pop(gone, None)
            state = self._states.get(gone)
            if state is None or state.state in (UNFIT, UNLOADING):
                continue
            in_memory = in_engine and order is not None and not self._held[gone].engine.base
            self._set(gone, UNLOADING if in_memory else AVAILABLE, order=order if in_memory else None)

    def engine_said(self, model: fleet_pb2.NodeModel) -> None:
        """Take the engine's word on a model that it was ordered to load."""
        if model.name not in self._orders:
            if model.state == AVAILABLE and self._unloading(model.name):
                self._set(model.name, AVAILABLE)
            return
        if model.state == AVAILABLE:
            return  # unloaded, and ordered again meanwhile
        self._ended.pop(model.name, None)
        if model.state == FAILED:
            del self._orders[model.name]
        version = self._held[model.name].engine.version
        self._set(
            model.name,
            model.state,
            version=version,
            detail=model.detail,
            said=model,
        )

    def _unloading(self, name: str) -> bool:
        state = self._states.get(name)
        return state is not None and state.state == UNLOADING

    def engine_lost(self, *, ready: bool) -> None:
        """Models that were loaded, or about to be, are loaded again, but for one that ends every engine.

        `ready`: the engine had been given its orders. It carries them out one after the other.
        """
        loading = next((name for name in self._orders if self._states[name].state == LOADING), "") if ready else ""
        if loading:
            self._ended[loading] += 1
            if self._ended[loading] >= _ENGINES_PER_LOAD:
                del self._orders[loading]
                self._set(loading, FAILED, detail=f"The engine ended {_ENGINES_PER_LOAD} times while it loaded this.")
        for name in self._orders:
            self._set(name, LOADING)
        for name in [name for name in self._states if self._unloading(name)]:
            self._set(name, AVAILABLE)

    def _initial(self, model: HeldModel) -> fleet_pb2.NodeModel:
        need = model.record.weight_bytes + model.record.workspace_bytes
        state = fleet_pb2.NodeModel(name=model.name, version=model.engine.version, state=AVAILABLE)
        if need > self._largest:
            state.state = UNFIT
            state.detail = f"needs {need / 2**30:.1f} GiB, the largest device has {self._largest / 2**30:.1f} GiB"
        return state

    def _set(
        self,
        name: str,
        state: fleet_pb2.ModelState.ValueType,
        *,
        version: str = "",
        detail: str = "",
        order: work_pb2.LoadModel | None = None,
        said: fleet_pb2.NodeModel | None = None,
    ) -> None:
        """`order` is the one to load it, where it is not kept any more; `said` is the engine's word."""
        shown = fleet_pb2.NodeModel(
            name=name, version=version or self._held[name].engine.version, state=state, detail=detail
        )
        order = order or self._orders.get(name)
        if order is not None:
            shown.device_id, shown.budget_bytes = order.device_id, order.memory_budget_bytes
        if said is not None:
            shown.total_blocks, shown.free_blocks = said.total_blocks, said.free_blocks
            shown.measured_bytes, shown.measured_fixed_bytes = said.measured_bytes, said.measured_fixed_bytes
            shown.load_ms = said.load_ms
        self._states[name] = shown
        self._changed.add(name)
