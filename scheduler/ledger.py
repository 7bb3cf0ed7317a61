"""What a model needs and where it fits: decided before it is loaded, from the worker's record alone.

The plan is a pure function of the record, so that a new leader comes to the same one.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmos.internal.v1 import registry_pb2
from llmos.v1 import fleet_pb2


@dataclass(frozen=True, slots=True)
class Demand:
    """Bytes on a device without which a model is of no use."""

    weights: int
    workspace: int
    least_kv: int

    @property
    def total(self) -> int:
        """Bytes, all together."""
        return self.weights + self.workspace + self.least_kv


@dataclass(frozen=True, slots=True)
class Allocation:
    """A model may be loaded: on this device, within this budget of bytes for weights, workspace and KV blocks."""

    model: str
    version: str
    device_id: str
    budget_bytes: int
    beside_bytes: int = 0
    """Of the device, kept free for the model's adapters."""


@dataclass(frozen=True, slots=True)
class Unfit:
    """A model must not be loaded, and why."""

    model: str
    version: str
    reason: str


def demand(record: registry_pb2.ModelRecord, min_kv_tokens: int, fixed: int | None = None) -> Demand:
    """What the record says, with KV cache for `min_kv_tokens` or one whole context, whichever is less.

    `fixed`: weights and workspace as measured, in place of what is declared.
    """
    workspace = record.workspace_bytes if fixed is None else min(record.workspace_bytes, fixed)
    weights = record.weight_bytes if fixed is None else fixed - workspace
    tokens = min(min_kv_tokens, record.model.context_length or min_kv_tokens)
    return Demand(weights, workspace, tokens * record.kv_bytes_per_token)


def plan(
    record: registry_pb2.WorkerRecord,
    min_kv_tokens: int,
    adapter_slots: int = 0,
    *,
    fixed: Callable[[registry_pb2.ModelRecord], int] | None = None,
    withheld: Mapping[str, int] | None = None,
) -> list[Allocation | Unfit]:
    """Place a worker's models in the order it names them, and adapters with their base.

    Beside a model, the bytes of its `adapter_slots` largest adapters are kept free. What is left on a device afterwards
    is divided evenly among its models that have a KV cache. No device is ever promised more than its memory.
    `fixed` gives weights and workspace as measured; `withheld` are bytes of devices that are not for models.
    """
    kept = withheld or {}
    left = {device.id: max(0, device.memory_bytes - kept.get(device.id, 0)) for device in record.capacity.devices}
    placed: list[tuple[registry_pb2.ModelRecord, str, int]] = []
    unfit: list[Allocation | Unfit] = []
    roomy: dict[str, str] = {}
    kept_free: dict[str, int] = {}
    for model in record.models:
        if model.model.base_model:
            continue
        measured = None if fixed is None else fixed(model)
        need = demand(model, min_kv_tokens, measured).total
        beside = adapters_bytes(record, model.model.name, adapter_slots)
        device = _device_for(need + beside, left, record.capacity.devices)
        if device is not None:
            roomy[model.model.name] = device
            kept_free[model.model.name] = beside
            left[device] -= beside
        else:
            device = _device_for(need, left, record.capacity.devices)
        if device is None:
            unfit.append(Unfit(model.model.name, model.model.version, _reason(need, left)))
            continue
        left[device] -= need
        placed.append((model, device, need))
    models: list[Allocation | Unfit] = [
        Allocation(
            m.model.name,
            m.model.version,
            device,
            need + _share(m, device, placed, left[device]),
            kept_free.get(m.model.name, 0),
        )
        for m, device, need in placed
    ]
    return unfit + models + [_beside(model, roomy) for model in record.models if model.model.base_model]


def _share(
    model: registry_pb2.ModelRecord,
    device: str,
    placed: Sequence[tuple[registry_pb2.ModelRecord, str, int]],
    left: int,
) -> int:
    """A model's part of what is left on its device: encoders need none where decoders do."""
    there = [other for other, where, _ in placed if where == device]
    growing = [other for other in there if other.kv_bytes_per_token] or there
    return left // len(growing) if model in growing else 0


def adapters_bytes(record: registry_pb2.WorkerRecord, base: str, slots: int) -> int:
    """Bytes of the largest adapters of a model that may be loaded together."""
    sizes = (model.weight_bytes for model in record.models if model.model.base_model == base)
    return sum(heapq.nlargest(slots, sizes))


def _beside(adapter: registry_pb2.ModelRecord, roomy: dict[str, str]) -> Allocation | Unfit:
    """An adapter goes where its base is, if that left room for adapters."""
    device = roomy.get(adapter.model.base_model)
    if device is None:
        return Unfit(adapter.model.name, adapter.model.version, "its base is not here, or leaves no room for adapters")
    return Allocation(adapter.model.name, adapter.model.version, device, adapter.weight_bytes)


def _device_for(need: int, left: dict[str, int], devices: Sequence[fleet_pb2.Device]) -> str | None:
    """The roomiest device of the default's kind; another kind only if none of them has room."""
    fitting = [device for device in devices if left[device.id] >= need]
    if not fitting:
        return None
    default = devices[0].kind
    return max(fitting, key=lambda device: (device.kind == default, left[device.id])).id


def _reason(need: int, left: dict[str, int]) -> str:
    most = max(left.values(), default=0)
    return f"needs {need / 2**30:.1f} GiB, the roomiest device has {max(most, 0) / 2**30:.1f} GiB left"
