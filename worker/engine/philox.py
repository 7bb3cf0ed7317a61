"""Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).

Words are unsigned 32-bit integers kept in int64 tensors. Exact on every device: integer arithmetic only.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORDS = 4

Counter = tuple[Tensor, Tensor, Tensor, Tensor]
Key = tuple[Tensor, Tensor]


def philox4x32(counter: Counter, key: Key) -> Counter:
    """Four random words for each counter and key. All six inputs broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    # The int64 product wraps modulo 2**64; the mask removes the sign that the shift drags in.
    product = word * factor
    return (product >> 32).bitwise_and_(_MASK), product & _MASK


def token_words(seeds: Tensor, choices: Tensor, indices: Tensor, vocabulary: int) -> Tensor:
    """One word for each (seed, choice, index) and each token id: [rows, vocabulary], from three int64 [rows] tensors.

    A word depends on its own row's key and its own token id alone. `seeds` are 64 bits, sign ignored.
    """
    blocks = torch.arange(-(-vocabulary // _WORDS), device=seeds.device)
    seeds, choices, indices = seeds[:, None], choices[:, None], indices[:, None]
    key = (seeds & _MASK, (seeds >> 32) & _MASK)
    words = philox4x32((blocks, indices & _MASK, choices & _MASK, torch.zeros_like(seeds)), key)
    return torch.stack(words, dim=-1).flatten(1)[:, :vocabulary]


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, from 32-bit words: -log(-log(u)) with u in the middle of each of 2**32 cells."""
    uniform = words.double().add_(0.5).mul_(2.0**-32)
    return uniform.log_().neg_().log_().neg_()
