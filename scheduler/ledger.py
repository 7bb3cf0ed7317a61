"""What a model needs and where it fits: decided before it is loaded, from the worker's record alone.

The plan is a pure function of the record, so that a new leader comes to the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True, slots=True)
class Unfit:
    """A model must not be loaded, and why."""

    model: str
    version: str
    reason: str


def demand(record: registry_pb2.ModelRecord, min_kv_tokens: int) -> Demand:
    """What the record says, with KV cache for `min_kv_tokens` or one whole context, whichever is less."""
    tokens = min(min_kv_tokens, record.model.context_length or min_kv_tokens)
    return Demand(record.weight_bytes, record.workspace_bytes, tokens * record.kv_bytes_per_token)


def plan(record: registry_pb2.WorkerRecord, min_kv_tokens: int) -> list[Allocation | Unfit]:
    """Place a worker's models in the order it names them.

    What is left on a device afterwards is divided evenly among its models as KV cache. No device is ever promised more
    than its memory.
    """
    left = {device.id: device.memory_bytes for device in record.capacity.devices}
    placed: list[tuple[registry_pb2.ModelRecord, str, int]] = []
    unfit: list[Allocation | Unfit] = []
    for model in record.models:
        need = demand(model, min_kv_tokens).total
        device = _device_for(need, left, record.capacity.devices)
        if device is None:
            unfit.append(Unfit(model.model.name, model.model.version, _reason(need, left)))
            continue
        left[device] -= need
        placed.append((model, device, need))
    sharers = {device: sum(d == device for _, d, _ in placed) for device in left}
    return unfit + [
        Allocation(m.model.name, m.model.version, device, need + left[device] // sharers[device])
        for m, device, need in placed
    ]


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
