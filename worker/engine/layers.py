"""Layers whose every row has the same bits whatever it shares a call with.

Matrix products choose their order of summation by the number of rows, and element-wise kernels treat the elements of a
last, partial vector differently. Both are replaced by calls of one fixed shape; measurements are in
`docs/decisions/0005-exactness-in-fp32.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

TILE_ROWS = 8
"""Rows of every matrix product on the CPU. Reading the weights dominates at 1 row and still does at 8."""
CUDA_TILE_ROWS = 64
"""The same on CUDA, where it does up to some hundred rows."""
_WIDE_ROWS = (64, 32, 16)
"""Rows of products that take the place of several tiles where a check at load finds the same bits."""
_COLUMN_BLOCK_BYTES = 8 << 20
"""Weights of a product that is repeated for each tile of rows: they should still be in the cache the second time."""
_VECTOR = 32
"""Elements of two AVX-512 vectors, the stride of torch's vectorized loops."""
_RUN = 16_384
"""Elements per element-wise call: a multiple of `_VECTOR`, below the size at which torch splits work over threads."""
_ACTIVATION_MODULES = ("transformers.activations", "torch.nn.modules.activation")
_NOT_ELEMENTWISE = (nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Softmax2d, nn.GLU, nn.MultiheadAttention)


def tile_rows(device: torch.device) -> int:
    """Rows of every matrix product on a device; a step's rows are padded to a multiple of it."""
    return TILE_ROWS if device.type == "cpu" else CUDA_TILE_ROWS


class FixedRowLinear(nn.Module):
    """y = x W^T + b in products of exactly `tile_rows` rows. On the CPU it holds its own packed copy of the weights.

    `weight` is [outputs, inputs], `bias` [outputs] or None, both of one type: float32 on the CPU. `wide`: take more
    rows at a time while there are so many, if that is seen to give the same bits for this layer.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, wide: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight_bytes = weight.nbytes
        self.dtype, self._rows = weight.dtype, tile_rows(weight.device)
        self._packed = weight.device.type == "cpu" and bool(torch._C._has_mkldnn)
        self._blocks = [
            (self._pack(weight[first:last].detach()), None if bias is None else bias[first:last].detach())
            for first, last in _column_blocks(weight)
        ]
        wider = [rows for rows in _WIDE_ROWS if wide and rows > self._rows and self._same_bits(rows, weight.device)]
        self._tiles = [*wider, self._rows]

    def tensors(self) -> Iterator[Tensor]:
        """Its weights, as it holds them."""
        for weight, bias in self._blocks:
            yield weight
            if bias is not None:
                yield bias

    def _same_bits(self, rows: int, device: torch.device) -> bool:
        noise = torch.randn(rows, self.in_features, generator=torch.Generator().manual_seed(0)).to(device)
        tiles = torch.split(noise, self._rows)
        return all(
            torch.equal(self._product(noise, weight, bias), self._products(tiles, weight, bias))
            for weight, bias in self._blocks
        )

    def _pack(self, weight: Tensor) -> Tensor:
        if not self._packed:
            return weight.contiguous()
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TILE_ROWS)
        return packed

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        rows = x.reshape(-1, self.in_features)
        count = rows.shape[0]
        if not count:
            return x.new_empty(*x.shape[:-1], self.out_features)
        tiles = self._cut(rows)
        out = _joined([self._products(tiles, weight, bias) for weight, bias in self._blocks], dim=1)
        return out[:count].view(*x.shape[:-1], self.out_features)

    def _cut(self, rows: Tensor) -> list[Tensor]:
        """Tiles, the widest first; the last one is padded."""
        sizes: list[int] = []
        left = rows.shape[0]
        for size in self._tiles:
            sizes += [size] * (left // size)
            left %= size
        tiles = list(torch.split(rows, [*sizes, left] if left else sizes))
        if left:
            tiles[-1] = nnf.pad(tiles[-1], (0, 0, 0, self._rows - left))
        return tiles

    def _products(self, tiles: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
        return _joined([self._product(tile, weight, bias) for tile in tiles], dim=0)

    def _product(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._packed:
            return nnf.linear(rows, weight, bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
        return product


class FloatOutputLinear(FixedRowLinear):
    """The output layer of a model in half precision on CUDA: its sums are not rounded, as logits that tie would be."""

    def _product(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = torch.mm(rows, weight.t(), out_dtype=torch.float32)
        return out if bias is None else out + bias


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _column_blocks(weight: Tensor) -> Iterator[tuple[int, int]]:
    outputs = weight.shape[0]
    if weight.device.type != "cpu":
        yield 0, outputs
        return
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
        if not x.is_cpu:
            plain: Tensor = self.function(x)
            return plain
        flat = x.reshape(-1)
        if flat.shape[0] % _VECTOR:
            flat = nnf.pad(flat, (0, -flat.shape[0] % _VECTOR))
        if flat.shape[0] <= _RUN:
            out: Tensor = self.function(flat)
        else:
            out = torch.cat([self.function(run) for run in torch.split(flat, _RUN)])
        return out[: x.numel()].view(x.shape)


def steady_layers(model: nn.Module, *, wide: bool = False) -> None:
    """Replace, in place, every linear layer and activation of a model that is on its device. `wide`: see the layer.

    On CUDA an activation's element has the same bits wherever it is, and goes through as it is.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            replacement = _replacement(child, wide, child is head)
            if replacement is not None:
                setattr(parent, name, replacement)


def _replacement(module: nn.Module, wide: bool, is_head: bool) -> nn.Module | None:
    if isinstance(module, Conv1D):
        return FixedRowLinear(module.weight.t(), module.bias, wide=wide)
    if type(module) is nn.Linear:
        weight = module.weight
        kind = FloatOutputLinear if is_head and weight.is_cuda and weight.dtype != torch.float32 else FixedRowLinear
        return kind(weight, module.bias, wide=wide)
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
