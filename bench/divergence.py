"""How far sides' next-token distributions are from fp32's. The arithmetic is `worker.quality.distance`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bench.sides.side import Side
from worker.quality.distance import CHUNK_ROWS, Distance, Logits, distance

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Quality:
    """Of one side, over texts of one length."""

    kl: float
    """Mean KL divergence from the reference, nats per token."""
    perplexity: float
    reference_perplexity: float

    @property
    def perplexity_ratio(self) -> float:
        """To the reference's."""
        return self.perplexity / self.reference_perplexity


def qualities(reference: Side, sides: Sequence[Side], texts: Sequence[Sequence[int]]) -> list[Quality]:
    """Each side's, over every position of the texts (all of one length). The reference computes each text once."""
    found: list[list[Distance]] = [[] for _ in sides]
    for text in texts:
        expected = reference.logits(list(text))
        for one, distances in zip(sides, found, strict=True):
            distances.append(distance(_pieces_of(expected), _pieces_of(one.logits(list(text))), [text]))
    return [mean(distances) for distances in found]


def mean(distances: Sequence[Distance]) -> Quality:
    """Of texts of one length."""
    return Quality(
        kl=statistics.fmean(one.kl for one in distances),
        perplexity=math.exp(statistics.fmean(math.log(one.perplexity) for one in distances)),
        reference_perplexity=math.exp(statistics.fmean(math.log(one.reference_perplexity) for one in distances)),
    )


def _pieces_of(logits: Array) -> Logits:
    def pieces(text: Sequence[int]) -> Iterator[torch.Tensor]:
        del text
        for first in range(0, len(logits), CHUNK_ROWS):
            yield torch.from_numpy(logits[first : first + CHUNK_ROWS])

    return pieces
