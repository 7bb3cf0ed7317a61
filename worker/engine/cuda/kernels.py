"""Triton kernels: keys and values into their slots, and attention of single rows over KV blocks.

A row's loop over its keys begins and ends where the row's own sequence says and advances by a number of keys that the
model fixes, with a running maximum and sum as in "Online normalizer calculation for softmax" (Milakov and Gimelshein,
2018). So its bits depend on nothing else in the step.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from worker.engine.attention import LayerCall
from worker.engine.kv import BLOCK_TOKENS

_SHARED_BYTES = 64 << 10
"""Of a processor's fast memory for keys and values in flight; all since 2017 have as much."""
_LEAST_WIDTH = 16
"""Of a product's sides."""


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _store(  # type: ignore[no-untyped-def]
    source,
    places,
    slots,
    head_stride,
    row_stride,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    at = tl.arange(0, WIDTH)
    for head in range(HEADS):
        numbers = tl.load(source + head * head_stride + row * row_stride + at, mask=at < DIM)
        tl.store(places + (slot * HEADS + head) * DIM + at, numbers, mask=at < DIM)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _tile(  # type: ignore[no-untyped-def]
    places, rows, wanted, at, DIM: tl.constexpr
):
    """Numbers `at` of each of `rows`; zeros where a row is not wanted, or ends."""
    mask = wanted[:, None] & (at < DIM)[None, :]
    return tl.load(places + rows[:, None] + at[None, :], mask=mask, other=0.0)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _fold(  # type: ignore[no-untyped-def]
    scores, value, most, total, sums
):
    """Maximum, weights and weighted values of the keys so far, with those of a step."""
    peak = tl.maximum(most, tl.max(scores, 1))
    weights, shrink = tl.exp(scores - peak[:, None]), tl.exp(most - peak)
    product = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return peak, total * shrink + tl.sum(weights, 1), sums * shrink[:, None] + product


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _attend(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    blocks,
    begins,
    lengths,
    out,
    scaling,
    softcap,
    head_stride,
    row_stride,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length, begin = tl.load(lengths + row).to(tl.int32), tl.load(begins + row)
    first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else length * 0
    at, value_at, step = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH), tl.arange(0, STEP)
    heads = head * GROUP + tl.arange(0, GROUP_WIDTH)
    own = tl.arange(0, GROUP_WIDTH) < GROUP
    asked = _tile(query, heads * head_stride + row * row_stride, own, at, DIM)
    most = tl.full([GROUP_WIDTH], float("-inf"), tl.float32)
    total, sums = tl.zeros([GROUP_WIDTH], tl.float32), tl.zeros([GROUP_WIDTH, VALUE_WIDTH], tl.float32)
    for start in range(first // STEP * STEP, length, STEP):
        seen = (start + step >= first) & (start + step < length)
        block = tl.load(blocks + begin + start // BLOCK).to(tl.int64)
        slots = (block * BLOCK + start % BLOCK + step) * KV_HEADS + head
        scores = tl.dot(asked, tl.trans(_tile(keys, slots * DIM, seen, at, DIM)), input_precision="ieee") * scaling
        if softcap > 0:
            scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))
        scores = tl.where(seen[None, :], scores, float("-inf"))
        value = _tile(values, slots * VALUE_DIM, seen, value_at, VALUE_DIM)
        most, total, sums = _fold(scores, value, most, total, sums)
    places = out + (row * KV_HEADS * GROUP + heads[:, None]) * VALUE_DIM + value_at[None, :]
    mask = own[:, None] & (value_at < VALUE_DIM)[None, :]
    tl.store(places, (sums / total[:, None]).to(out.dtype.element_ty), mask=mask)


def store(source: Tensor, places: Tensor, slots: Tensor) -> None:
    """Rows of [heads, rows, dim] to `places` [slots, heads, dim] at `slots`, int64 [rows]."""
    heads, rows, dim = source.shape
    source = source if source.stride(2) == 1 else source.contiguous()
    _store[(rows,)](
        source, places, slots, source.stride(0), source.stride(1), HEADS=heads, DIM=dim, WIDTH=_width(dim), num_warps=1
    )


def attend(
    call: LayerCall, query: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, begins: Tensor, lengths: Tensor
) -> Tensor:
    """[heads, rows, dim] queries to [rows, heads, value_dim] over `keys` and `values` [slots, kv_heads, dim].

    Row i sees the first `lengths[i]` tokens of the blocks that `blocks` (int32) names from `begins[i]` on; of them the
    last `call.window`, if there is one. `begins` and `lengths` are int64 [rows], lengths at least 1.
    """
    rows, shape = query.shape[1], call.shape
    query = query if query.stride(2) == 1 else query.contiguous()
    out = query.new_empty(rows, call.heads, shape.value_dim)
    group = call.heads // shape.kv_heads
    stages, step = _pace(_width(shape.key_dim) + _width(shape.value_dim), keys.itemsize)
    _attend[(rows, shape.kv_heads)](
        query,
        keys,
        values,
        blocks,
        begins,
        lengths,
        out,
        call.scaling,
        call.softcap or 0.0,
        query.stride(0),
        query.stride(1),
        WINDOW=call.window or 0,
        KV_HEADS=shape.kv_heads,
        GROUP=group,
        GROUP_WIDTH=_width(group),
        DIM=shape.key_dim,
        WIDTH=_width(shape.key_dim),
        VALUE_DIM=shape.value_dim,
        VALUE_WIDTH=_width(shape.value_dim),
        BLOCK=BLOCK_TOKENS,
        STEP=step,
        num_warps=4,
        num_stages=stages,
    )
    return out


def _width(size: int) -> int:
    """The power of two that a side of a product is padded to."""
    return max(_LEAST_WIDTH, 1 << (size - 1).bit_length())


def _pace(numbers: int, itemsize: int) -> tuple[int, int]:
    """Steps in flight, and keys of a step, for keys and values of so many numbers together."""
    stages, step = 2, BLOCK_TOKENS
    while step > _LEAST_WIDTH and stages * step * numbers * itemsize > _SHARED_BYTES:
        step //= 2
    return stages, step
