"""Layers whose every row has the same bits whatever it shares a call with.

Matrix products choose their order of summation by the number of rows, and element-wise kernels treat the elements of a
last, partial vector differently. Both are replaced by calls of one fixed shape; measurements are in
`docs/decisions/0005-exactness-in-fp32.md`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

TILE_ROWS = 8
"""Rows of every matrix product. Reading the weights dominates at 1 row and still does at 8."""
_COLUMN_BLOCK_BYTES = 8 << 20
"""Weights of a product that is repeated for each tile of rows: they should still be in the cache the second time."""
_VECTOR = 32
"""Elements of two AVX-512 vectors, the stride of torch's vectorized loops."""
_RUN = 16_384
"""Elements per element-wise call: a multiple of `_VECTOR`, below the size at which torch splits work over threads."""
_ACTIVATION_MODULES = ("transformers.activations", "torch.nn.modules.activation")
_NOT_ELEMENTWISE = (nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Softmax2d, nn.GLU, nn.MultiheadAttention)


class FixedRowLinear(nn.Module):
    """y = x W^T + b in products of exactly `TILE_ROWS` rows. Holds its own packed copy of the weights.

    `weight` is [outputs, inputs], `bias` [outputs] or None, both float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight_bytes = weight.nbytes
        self._packed = weight.device.type == "cpu" and bool(torch._C._has_mkldnn)
        self._blocks = [
            (self._pack(weight[first:last].detach()), None if bias is None else bias[first:last].detach())
            for first, last in _column_blocks(weight)
        ]

    def _pack(self, weight: Tensor) -> Tensor:
        if not self._packed:
            return weight.contiguous()
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TILE_ROWS)
        return packed

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        rows = x.reshape(-1, self.in_features)
        count = rows.shape[0]
        if count % TILE_ROWS:
            rows = nnf.pad(rows, (0, 0, 0, -count % TILE_ROWS))
        if not count:
            return x.new_empty(*x.shape[:-1], self.out_features)
        out = _joined([self._tiled(rows, weight, bias) for weight, bias in self._blocks], dim=1)
        return out[:count].view(*x.shape[:-1], self.out_features)

    def _tiled(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _joined([self._product(tile, weight, bias) for tile in torch.split(rows, TILE_ROWS)], dim=0)

    def _product(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._packed:
            return nnf.linear(rows, weight, bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
        return product


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _column_blocks(weight: Tensor) -> Iterator[tuple[int, int]]:
    outputs = weight.shape[0]
    width = max(64, _COLUMN_BLOCK_BYTES // (weight[0].nbytes * 64) * 64)
    for first in range(0, outputs, width):
        yield first, min(first + width, outputs)


class SteadyActivation(nn.Module):
    """An element-wise function that takes the vectorized path for every element, with any number of threads."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        flat = x.reshape(-1)
        if flat.shape[0] % _VECTOR:
            flat = nnf.pad(flat, (0, -flat.shape[0] % _VECTOR))
        if flat.shape[0] <= _RUN:
            out: Tensor = self.function(flat)
        else:
            out = torch.cat([self.function(run) for run in torch.split(flat, _RUN)])
        return out[: x.numel()].view(x.shape)


def steady_layers(model: nn.Module) -> None:
    """Replace, in place, every linear layer and activation of a model that is on its device."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            replacement = _replacement(child)
            if replacement is not None:
                setattr(parent, name, replacement)


def _replacement(module: nn.Module) -> nn.Module | None:
    if isinstance(module, Conv1D):
        return FixedRowLinear(module.weight.t(), module.bias)
    if type(module) is nn.Linear:
        return FixedRowLinear(module.weight, module.bias)
    if type(module).__module__ in _ACTIVATION_MODULES and not isinstance(module, _NOT_ELEMENTWISE):
        return SteadyActivation(module)
    return None


def unknown_weights(model: nn.Module) -> list[str]:
    """Names of weights that are multiplied outside the layers that `steady_layers` knows (experts, convolutions)."""
    return [
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if not isinstance(module, nn.Embedding)
        for name, weight in module.named_parameters(recurse=False)
        if weight.ndim >= 2
    ]
