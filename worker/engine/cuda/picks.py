"""The draw's last stage on CUDA in one kernel: noise for every token, and which one wins.

What `worker/engine/drawing.py` computes with some hundred operations of torch, from the same words of Philox4x32-10.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCKS = 512
"""Of four tokens each, in one program."""
_NOBODY = 2**62


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _best(  # type: ignore[no-untyped-def]
    scores, words, token, vocabulary
):
    """Score and token of the likeliest after noise; the lowest of several."""
    score = tl.load(scores + token, mask=token < vocabulary, other=float("-inf"))
    uniform = (words.to(tl.float64) + 0.5) * (1.0 / 4294967296.0)
    noisy = score - tl.log(-tl.log(uniform))
    most = tl.max(noisy, 0)
    return most, tl.min(tl.where(noisy == most, token, vocabulary), 0)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _pick(  # type: ignore[no-untyped-def]
    scores,
    keys,
    bests,
    tokens,
    vocabulary,
    programs,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    seed = tl.load(keys + row * 3)
    choice = tl.load(keys + row * 3 + 1)
    index = tl.load(keys + row * 3 + 2)
    block = part * BLOCKS + tl.arange(0, BLOCKS)
    c0 = block.to(tl.uint32)
    c1 = (index & 0xFFFFFFFF).to(tl.uint32) + c0 * 0
    c2 = (choice & 0xFFFFFFFF).to(tl.uint32) + c0 * 0
    c3 = c0 * 0
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        high0, low0 = (product0 >> 32).to(tl.uint32), product0.to(tl.uint32)
        high1, low1 = (product1 >> 32).to(tl.uint32), product1.to(tl.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    own = scores + row * vocabulary
    most, found = _best(own, c0, block * 4, vocabulary)
    other, token = _best(own, c1, block * 4 + 1, vocabulary)
    found = tl.where((other > most) | ((other == most) & (token < found)), token, found)
    most = tl.maximum(most, other)
    other, token = _best(own, c2, block * 4 + 2, vocabulary)
    found = tl.where((other > most) | ((other == most) & (token < found)), token, found)
    most = tl.maximum(most, other)
    other, token = _best(own, c3, block * 4 + 3, vocabulary)
    found = tl.where((other > most) | ((other == most) & (token < found)), token, found)
    most = tl.maximum(most, other)
    tl.store(bests + row * programs + part, most)
    tl.store(tokens + row * programs + part, found)


def pick(scores: Tensor, keys: Tensor) -> list[int]:
    """A token per row of `scores`, contiguous float64 [rows, vocabulary], of which minus infinity is never drawn.

    `keys`: seed, choice and index of each row, int64 [rows, 3].
    """
    rows, vocabulary = scores.shape
    programs = triton.cdiv(vocabulary, 4 * _BLOCKS)
    bests = torch.empty(rows, programs, dtype=torch.float64, device=scores.device)
    tokens = torch.empty(rows, programs, dtype=torch.int64, device=scores.device)
    _pick[(rows, programs)](scores, keys, bests, tokens, vocabulary, programs, BLOCKS=_BLOCKS, num_warps=4)
    winners = torch.where(bests == bests.amax(-1, keepdim=True), tokens, _NOBODY).amin(-1)
    drawn: list[int] = winners.tolist()
    return drawn
