"""How far a side's next-token distributions are from fp32's. The arithmetic is `worker.quality.distance`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from bench.sides.side import Side
from worker.quality.distance import CHUNK_ROWS, Distance, Logits, distance

Array = NDArray[np.float32]


def of_side(one: Side) -> Logits:
    """A side's logits of a text, in pieces."""
    return lambda text: _pieces(one.logits(list(text)))


def of_array(logits: Array) -> Logits:
    """Logits that were computed before, float32 [tokens, vocabulary]; for a single text."""
    return lambda text: _pieces(logits)


def kl(expected: Array, found: Array) -> float:
    """Mean KL divergence of `found` from `expected`, nats per token; both float32 [tokens, vocabulary]."""
    return distance(of_array(expected), of_array(found), [[0] * len(expected)]).kl


def between(reference: Side, candidate: Side, texts: Sequence[Sequence[int]]) -> Distance:
    """Over every position of the texts."""
    return distance(of_side(reference), of_side(candidate), texts)


def _pieces(logits: Array) -> Iterator[torch.Tensor]:
    for first in range(0, len(logits), CHUNK_ROWS):
        yield torch.from_numpy(logits[first : first + CHUNK_ROWS])
