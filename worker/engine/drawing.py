"""Draws tokens with torch: what `worker/kernels/pick.h` computes, bit for bit, where there are no kernels.

A draw is the argmax of `logits / temperature + gumbel noise` over the tokens that the filters keep. Everything that
decides it is a fixed sequence of basic operations in float64, or whole numbers, whose sums do not depend on order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.engine.philox import LN2_HIGH, LN2_LOW, gumbel, token_words

_NUCLEUS_FIRST = 1024
"""Candidates that top-p looks at first; sorting a whole vocabulary takes milliseconds."""
_NO_MASS = -23.0
"""Scaled logits so far below the likeliest weigh nothing: exp(-23) * 2**32 is less than a half."""
_EXP_SERIES = tuple(1 / math.factorial(n) for n in range(10, -1, -1))


@dataclass(frozen=True, slots=True)
class Draw:
    """How a row's token is drawn. `seed` has 64 bits; `log_min_p` is minus infinity if min-p keeps all."""

    temperature: float
    top_k: int
    top_p: float
    log_min_p: float
    seed: int
    choice: int
    index: int


def draw(logits: Tensor, rows: Sequence[Draw]) -> list[int]:
    """A token per row of `logits` ([rows, vocabulary], largest values finite)."""

    def column(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=logits.device)

    temperatures = torch.tensor([row.temperature for row in rows], dtype=torch.float64, device=logits.device)
    scores = logits.double().div_(temperatures[:, None])
    for values, row in zip(scores, rows, strict=True):
        _keep(values, row)
    if logits.is_cuda:
        from worker.engine.cuda.picks import pick

        keys = [[_signed(row.seed), row.choice, row.index] for row in rows]
        return pick(scores, torch.tensor(keys, dtype=torch.int64, device=logits.device))
    words = token_words(
        column([_signed(row.seed) for row in rows]),
        column([row.choice for row in rows]),
        column([row.index for row in rows]),
        logits.shape[-1],
    )
    likeliest = scores.argmax(-1, keepdim=True)
    best = scores.gather(1, likeliest) + gumbel(words.gather(1, likeliest))
    # A token wins if -log(u) <= exp(score - best), and 1 - u is no more than -log(u): few need their noise proper.
    able = 2.0**32 - 0.5 - words.double() <= (scores - best).exp_().mul_(2.0**32 * (1 + 1e-6))
    final = torch.full_like(scores, -math.inf)
    final[able] = scores[able] + gumbel(words[able])
    tokens: list[int] = final.argmax(-1).tolist()
    return tokens


def _signed(seed: int) -> int:
    seed &= 0xFFFFFFFFFFFFFFFF
    return seed - (1 << 64) if seed >> 63 else seed


def _keep(values: Tensor, row: Draw) -> None:
    """Set what min-p, top-k and top-p leave out to minus infinity, in place on one row of scaled logits."""
    if row.log_min_p > -math.inf:
        _cut(values, float(values.amax()) + row.log_min_p)
    if 0 < row.top_k < values.shape[0]:
        _cut(values, float(values.topk(row.top_k).values[-1]))
    if row.top_p < 1:
        _cut(values, _nucleus_threshold(values, row.top_p))


def _cut(values: Tensor, threshold: float) -> None:
    values.masked_fill_(values < threshold, -math.inf)


def _nucleus_threshold(values: Tensor, top_p: float) -> float:
    """Least value in the smallest set of largest ones that together reach `top_p` of the mass; never an empty set."""
    peak = values.amax()
    target = top_p * float(mass(values - peak).sum())
    count = min(_NUCLEUS_FIRST, values.shape[0])
    while True:
        largest = values.topk(count).values
        inside = 1 + int((mass(largest - peak).cumsum(0)[:-1] < target).sum())
        if inside < count or count == values.shape[0]:
            return float(largest[inside - 1])
        count = min(count * 4, values.shape[0])


def mass(x: Tensor) -> Tensor:
    """exp(x) * 2**32 for x <= 0, to the nearest whole number (float64)."""
    bounded = x.clamp(min=_NO_MASS)
    n = (bounded * 1.4426950408889634).round()
    r = (bounded - n * LN2_HIGH) - n * LN2_LOW
    p = torch.full_like(r, _EXP_SERIES[0])
    for factor in _EXP_SERIES[1:]:
        p = p * r + factor
    power = ((n.long() + (1023 + 32)) << 52).view(torch.float64)
    return torch.where(x > _NO_MASS, (p * power).round(), 0.0)
