"""Linear layers in the precisions of a plan, in torch: the arithmetic of the kernels for every decoder and machine.

Weights in groups of 64 inputs with a bfloat16 scale each, activations in int16 with a scale per row. Inside a group the
sum is exact, the groups follow in order: a row's bits do not depend on the rows beside it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

GROUP = 64
"""Inputs that share a scale; other widths are filled up with zeros."""
_MOST = 127
_MOST_ACTIVATION = 32767.0
_BLOCK = 2048
"""Outputs computed at a time, so that what lies between stays small."""


def grouped(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize [outputs, inputs]: int8 [outputs, groups, 64] and bfloat16 scales [outputs, groups]."""
    rows = nnf.pad(weight.detach().float(), (0, -weight.shape[1] % GROUP)).reshape(len(weight), -1, GROUP)
    # Rounded up to a bfloat16, so that no weight exceeds 127.
    words = (rows.abs().amax(-1) / _MOST).view(torch.int32) + 0xFFFF
    scales = (words >> 16).to(torch.int16).view(torch.bfloat16)
    wide = scales.float()
    inverse = torch.where(wide > 0, 1.0 / wide, 0.0)
    return (rows * inverse[..., None]).round().clamp(-_MOST, _MOST).to(torch.int8), scales


def restored(weight: Tensor) -> Tensor:
    """What [outputs, inputs] becomes in int8, as floats of the same shape."""
    return torch.cat([_restored(block) for block in torch.split(weight, _BLOCK)])


def _restored(weight: Tensor) -> Tensor:
    numbers, scales = grouped(weight)
    return (numbers.float() * scales.float()[..., None]).flatten(1)[:, : weight.shape[1]]


class GroupedLinear(nn.Module):
    """y = x W^T + b with W in int8 and x in int16. `weight` is [outputs, inputs], `bias` [outputs] or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._blocks = [grouped(block) for block in torch.split(weight, _BLOCK)]
        self._bias = None if bias is None else bias.detach().float()
        self.weight_bytes = sum(numbers.nbytes + scales.nbytes for numbers, scales in self._blocks)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs], float32."""
        rows = nnf.pad(x.reshape(-1, self.in_features).float(), (0, -self.in_features % GROUP))
        high, low, scale = _split(rows)
        # [groups, both halves of all rows, 64]
        halves = torch.cat([high, low]).reshape(2 * len(rows), -1, GROUP).transpose(0, 1)
        out = torch.cat([_product(halves, *block) for block in self._blocks], dim=1) * scale
        return (out if self._bias is None else out + self._bias).view(*x.shape[:-1], self.out_features)


def _split(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in int16 as 256 high + low, floats without a fraction, and their scales [rows, 1].

    A scale is not a number if an element is not finite: then nothing computed from the row is.
    """
    most = rows.abs().amax(-1, keepdim=True)
    scale = most / _MOST_ACTIVATION + (rows * 0.0).sum(-1, keepdim=True)
    whole = (rows * torch.where(most > 1e-30, _MOST_ACTIVATION / most, 0.0)).round().nan_to_num(0.0, 0.0, 0.0)
    high = ((whole + 128) / 256).floor()
    return high, whole - 256 * high, scale


def _product(halves: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """Sums over [groups, 2 * rows, 64] with [outputs, groups, 64]: [rows, outputs]."""
    # At most 64 * 128 * 127 in magnitude: exact in float32, in whatever order.
    sums = torch.bmm(halves, numbers.float().permute(1, 2, 0))
    high, low = sums.double().chunk(2, dim=1)
    exact = (256 * high + low).float().double()
    total = torch.zeros_like(exact[0])
    for group, scale in zip(exact, scales.double().unbind(1), strict=True):
        # One rounding per group, as the kernels' fused multiply-add has.
        total = (group * scale + total).float().double()
    return total.float()
