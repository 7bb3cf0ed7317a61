"""RMS norms in one kernel each. transformers' take seven, and a step of a small model is little else than launches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

_SUFFIX = "RMSNorm"
_WIDEST = 16_384
_TOLERANCE = 1e-4


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _norm(  # type: ignore[no-untyped-def]
    rows,
    weight,
    out,
    row_stride,
    epsilon,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    FROM_ONE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    stored = tl.load(rows + row * row_stride + at, mask=at < SIZE, other=0.0)
    numbers = stored.to(tl.float32)
    scaled = numbers * tl.rsqrt(tl.sum(numbers * numbers, 0) / SIZE + epsilon)
    factors = tl.load(weight + at, mask=at < SIZE, other=0.0).to(tl.float32)
    # Where the weights count from zero, transformers rounds before it multiplies.
    scaled = scaled * (1.0 + factors) if FROM_ONE else scaled.to(stored.dtype).to(tl.float32) * factors
    tl.store(out + row * SIZE + at, scaled.to(stored.dtype), mask=at < SIZE)


class FusedNorm(nn.Module):
    """x / rms(x) * weight, or * (1 + weight), over the last dimension. `weight` is of x's type."""

    def __init__(self, weight: Tensor, epsilon: float, *, from_one: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self._epsilon = epsilon
        self._from_one = from_one

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        size = x.shape[-1]
        rows = x.reshape(-1, size)
        out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        width = triton.next_power_of_2(size)
        warps = min(8, max(1, width // 512))
        _norm[(rows.shape[0],)](
            rows,
            self.weight,
            out,
            rows.stride(0),
            self._epsilon,
            SIZE=size,
            WIDTH=width,
            FROM_ONE=self._from_one,
            num_warps=warps,
        )
        return out.view(x.shape)


def fuse_norms(model: nn.Module) -> int:
    """Replace, in place, the RMS norms of a model that is on its device. Returns how many.

    Which formula a module has is tried out; one that has another stays.
    """
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            fused = _fused(child) if type(child).__name__.endswith(_SUFFIX) else None
            if fused is not None:
                setattr(parent, name, fused)
                count += 1
    return count


def _fused(norm: nn.Module) -> FusedNorm | None:
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or weight.shape[0] > _WIDEST:
        return None
    source = torch.Generator().manual_seed(0)
    trial = torch.randn(64, weight.shape[0], generator=source).to(weight.device, weight.dtype)
    expected = norm(trial).float()
    for candidate in _candidates(norm, weight):
        found = candidate(trial).float()
        # Numbers on the border between two of a narrow type may be rounded to either; they are few.
        wrong = (found - expected).abs() > _TOLERANCE * expected.abs() + 1e-6
        if wrong.float().mean() < 0.01 and torch.allclose(found, expected, rtol=0.02, atol=1e-5):
            return candidate
    return None


def _candidates(norm: Any, weight: Tensor) -> Iterator[FusedNorm]:
    epsilon = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None)
    if isinstance(epsilon, float):
        yield FusedNorm(weight, epsilon, from_one=False)
        yield FusedNorm(weight, epsilon, from_one=True)
