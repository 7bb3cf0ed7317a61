"""Adapters in the layout of the kernels, and the table by which the rows of a step name them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmos.errors import SourceError
from llmos.store.adapter import TARGETS
from worker.engine.fast.arena import Arena, aligned
from worker.engine.lora import Adapter, Matrices
from worker.kernels import abi

_LANES = 8
_STAGES = (TARGETS[:3], TARGETS[3:4], TARGETS[4:6], TARGETS[6:])
"""Projections that share their input."""
_LARGEST = 13
"""Binary exponent below which all numbers are kept: those of float16 end at 16."""


@dataclass(frozen=True, slots=True)
class _Packed:
    """An adapter's layers, and the memory that they point to."""

    rank: int
    layers: ctypes.Array[abi.AdapterLayer]
    arena: Arena


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
        for (layer, target), pair in adapter.pairs.items():
            if layer >= self._layers or (pair.up.shape[0], pair.down.shape[1]) != self._shapes[target]:
                raise SourceError(f"The adapter does not fit {target} of layer {layer} of its base.")
        numbers = sum(pair.down.numel() + pair.up.numel() for pair in adapter.pairs.values())
        arena = Arena(numbers * torch.float16.itemsize + 2 * len(adapter.pairs) * aligned(1))
        layers = (abi.AdapterLayer * self._layers)()
        for number, layer in enumerate(layers):
            for stage in _STAGES:
                _fill(layer, {t: adapter.pairs[number, t] for t in stage if (number, t) in adapter.pairs}, arena)
        return _Packed(adapter.rank, layers, arena)


def _fill(layer: abi.AdapterLayer, pairs: Mapping[str, Matrices], arena: Arena) -> None:
    """Pack the pairs of one stage one after the other, in the order in which they are read."""
    for target, pair in pairs.items():
        layer.down[TARGETS.index(target)], layer.factor[TARGETS.index(target)] = _lanes(pair.down, arena)
    for target, pair in pairs.items():
        layer.up[TARGETS.index(target)], factor = _lanes(pair.up, arena)
        layer.factor[TARGETS.index(target)] *= factor


def _lanes(weight: Tensor, arena: Arena) -> tuple[int, float]:
    """Pack [outputs, inputs] as float16 [outputs / 8, inputs, 8]. Returns its address and the factor that it lacks.

    It is a power of two: no number gets too small for float16 that is not 2^27 times smaller than the largest one.
    """
    _, exponent = math.frexp(float(weight.abs().max()))
    factor = math.ldexp(1.0, exponent - _LARGEST)
    lanes = (weight.float() / factor).view(-1, _LANES, weight.shape[1]).transpose(1, 2)
    packed = arena.take(weight.numel() * torch.float16.itemsize).view(torch.float16).view(lanes.shape)
    packed.copy_(lanes)
    return packed.data_ptr(), factor


def _projection_shapes(shape: abi.Shape) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each projection."""
    hidden, inner = int(shape.hidden), int(shape.intermediate)
    query, key = int(shape.heads * shape.head_dim), int(shape.kv_heads * shape.head_dim)
    sizes = ((query, hidden), (key, hidden), (key, hidden), (hidden, query), (inner, hidden), (inner, hidden))
    return dict(zip(TARGETS, (*sizes, (hidden, inner)), strict=True))
