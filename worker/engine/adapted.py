"""Adapters on the general path: what they add to the projections of transformers' own modules, row by row.

Rows of one adapter are gathered and multiplied in the same products of fixed shape as the base's, so that a row's bits
depend neither on the rows beside it nor on their adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmos.errors import SourceError
from llmos.store.adapter import projection
from worker.engine.grouped import GroupedLinear
from worker.engine.layers import FixedRowLinear
from worker.engine.lora import NONE, Adapter, Matrices


@dataclass(slots=True)
class RowGroups:
    """Rows of the present pass by adapter: number, and int64 [rows]. One for all layers of a model."""

    present: list[tuple[int, Tensor]] = field(default_factory=list)

    def assign(self, adapters: Sequence[int], device: torch.device) -> None:
        """Adapters of the rows that come next; empty: none has one."""
        self.present = [
            (number, torch.tensor([row for row, own in enumerate(adapters) if own == number], device=device))
            for number in sorted(set(adapters) - {NONE})
        ]


class AdaptedLinear(nn.Module):
    """A linear layer, and beside it what the rows' adapters add."""

    def __init__(self, linear: FixedRowLinear | GroupedLinear, groups: RowGroups) -> None:
        super().__init__()
        self.linear = linear
        self._groups = groups
        self._pairs: dict[int, tuple[FixedRowLinear, FixedRowLinear]] = {}

    def put(self, number: int, matrices: Matrices) -> None:
        """Take an adapter's matrices over."""
        dtype = self.linear.dtype if isinstance(self.linear, FixedRowLinear) else torch.float32
        down, up = matrices.down.to(dtype), matrices.up.to(dtype)
        self._pairs[number] = FixedRowLinear(down, None), FixedRowLinear(up, None)

    def drop(self, number: int) -> None:
        """Forget them, if there are any."""
        self._pairs.pop(number, None)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        out: Tensor = self.linear(x)
        for number, rows in self._groups.present:
            if number in self._pairs:
                down, up = self._pairs[number]
                out.view(-1, self.linear.out_features)[rows] += up(down(x.reshape(-1, self.linear.in_features)[rows]))
        return out


class AdaptedLayers:
    """The projections of one model. They are wrapped when its first adapter comes: before, nothing is slower."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._groups = RowGroups()
        self._layers: dict[tuple[int, str], AdaptedLinear] = {}

    def assign(self, adapters: Sequence[int]) -> None:
        """Adapters of the rows that come next; empty: none has one."""
        self._groups.assign(adapters, self._device)

    def put(self, number: int, adapter: Adapter) -> None:
        """See `AdapterHolder.put_adapter`."""
        layers = self._layers or self._wrap()
        for (layer, target), pair in adapter.pairs.items():
            known = layers.get((layer, target))
            shape = None if known is None else (known.linear.out_features, known.linear.in_features)
            if shape != (pair.up.shape[0], pair.down.shape[1]):
                raise SourceError(f"The adapter does not fit {target} of layer {layer} of its base.")
        for where, pair in adapter.pairs.items():
            layers[where].put(number, Matrices(pair.down.to(self._device), pair.up.to(self._device)))

    def drop(self, number: int) -> None:
        """See `AdapterHolder.drop_adapter`."""
        for layer in self._layers.values():
            layer.drop(number)

    def _wrap(self) -> dict[tuple[int, str], AdaptedLinear]:
        for prefix, parent in list(self._model.named_modules()):
            for name, child in list(parent.named_children()):
                where = projection(f"{prefix}.{name}")
                if where is not None and isinstance(child, FixedRowLinear | GroupedLinear):
                    self._layers[where] = AdaptedLinear(child, self._groups)
                    setattr(parent, name, self._layers[where])
        return self._layers
