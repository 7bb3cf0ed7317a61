"""Adapters in the layout of the kernels, and the table by which the rows of a step name them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmos.errors import SourceError
from llmos.store.adapter import TARGETS
from worker.engine.lora import Adapter
from worker.kernels import abi
from worker.kernels.binding import address

_LANES = 8


@dataclass(frozen=True, slots=True)
class _Packed:
    """An adapter's layers, and the tensors that they point to."""

    rank: int
    layers: ctypes.Array[abi.AdapterLayer]
    kept: Sequence[Tensor]


class AdapterTable:
    """Adapters of one packed model by number, counted from 1. Owns their memory."""

    def __init__(self, shape: abi.Shape) -> None:
        self._layers = int(shape.layers)
        self._shapes = _projection_shapes(shape)
        self._packed: dict[int, _Packed] = {}
        self._table = (abi.Adapter * 0)()

    def put(self, number: int, adapter: Adapter) -> None:
        """See `AdapterHolder.put_adapter`."""
        self._packed[number] = self._pack(adapter)
        self._rebuild()

    def drop(self, number: int) -> None:
        """See `AdapterHolder.drop_adapter`."""
        self._packed.pop(number, None)
        self._rebuild()

    def fill(self, args: abi.StepArgs, rows: NDArray[np.int32]) -> None:
        """Name the adapters of a step's rows; `rows` counts from 0, -1 is none, and outlives the step."""
        args.adapter_count = len(self._table)
        args.adapters = self._table
        args.adapter = rows.ctypes.data

    def _rebuild(self) -> None:
        self._table = (abi.Adapter * max(self._packed, default=0))()
        for number, packed in self._packed.items():
            self._table[number - 1] = abi.Adapter(packed.layers, packed.rank)

    def _pack(self, adapter: Adapter) -> _Packed:
        if not 0 < adapter.rank <= abi.MOST_RANK or adapter.rank % _LANES:
            raise SourceError(f"The adapter's rank, {adapter.rank}, is more than {abi.MOST_RANK}.")
        layers, kept = (abi.AdapterLayer * self._layers)(), []
        for (layer, target), pair in adapter.pairs.items():
            fits = (pair.up.shape[0], pair.down.shape[1]) == self._shapes[target]
            if layer >= self._layers or not fits:
                raise SourceError(f"The adapter does not fit {target} of layer {layer} of its base.")
            down, up = _lanes(pair.down), _lanes(pair.up)
            kept += [down, up]
            layers[layer].down[TARGETS.index(target)] = address(down)
            layers[layer].up[TARGETS.index(target)] = address(up)
        return _Packed(adapter.rank, layers, kept)


def _lanes(weight: Tensor) -> Tensor:
    """[outputs, inputs] as [outputs / 8, inputs, 8]."""
    return weight.float().view(-1, _LANES, weight.shape[1]).transpose(1, 2).contiguous()


def _projection_shapes(shape: abi.Shape) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each projection."""
    hidden, inner = int(shape.hidden), int(shape.intermediate)
    query, key = int(shape.heads * shape.head_dim), int(shape.kv_heads * shape.head_dim)
    sizes = ((query, hidden), (key, hidden), (key, hidden), (hidden, query), (inner, hidden), (inner, hidden))
    return dict(zip(TARGETS, (*sizes, (hidden, inner)), strict=True))
