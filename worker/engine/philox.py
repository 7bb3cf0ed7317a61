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

LN2_HIGH, LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
"""log(2), the first part with so few bits that a product with a small whole number is exact."""
_ROOT_OF_TWO = 1.4142135623730951
_LOG_SERIES = (
    *(1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01, 2.222219843214978396e-01),
    *(2.857142874366239149e-01, 3.999999999940941908e-01, 6.666666666666735130e-01),
)

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
    return logarithm(logarithm((words.double() + 0.5) * 2.0**-32).neg()).neg()


def logarithm(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal float64 numbers, after fdlibm's e_log.c.

    Made of basic operations alone, whose results IEEE 754 fixes: the same bits on every device, and in the kernels.
    """
    word = x.view(torch.int64)
    exponent = ((word >> 52) - 1023).double()
    m = ((word & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).view(torch.float64)
    large = m > _ROOT_OF_TWO
    m = torch.where(large, m * 0.5, m)
    exponent = torch.where(large, exponent + 1.0, exponent)
    f = m - 1.0
    s = f / (f + 2.0)
    z = s * s
    r = torch.full_like(z, _LOG_SERIES[0])
    for factor in _LOG_SERIES[1:]:
        r = r * z + factor
    half = f * f * 0.5
    low = s * (half + r * z) + exponent * LN2_LOW
    return exponent * LN2_HIGH - ((half - low) - f)
