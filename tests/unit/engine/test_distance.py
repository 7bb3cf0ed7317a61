"""Divergence, perplexity and agreement, on distributions small enough to work out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from worker.quality.corpus import articles
from worker.quality.distance import Logits, distance


def constant(*probabilities: float, chunk: int = 2) -> Logits:
    """A model that expects the same of every position."""

    def logits(text: Sequence[int]) -> Iterator[Tensor]:
        for first in range(0, len(text), chunk):
            yield torch.tensor([[math.log(p) for p in probabilities]] * min(chunk, len(text) - first))

    return logits


def test_a_model_is_no_distance_from_itself() -> None:
    found = distance(constant(0.5, 0.5), constant(0.5, 0.5), [[0, 1, 0], [1, 1]])
    assert (found.kl, found.agreement, found.tokens) == (0, 1, 5)
    assert found.perplexity == found.reference_perplexity == pytest.approx(2)
    assert found.perplexity_ratio == pytest.approx(1)


def test_divergence_and_perplexity_by_hand() -> None:
    advanced: list[int] = []
    found = distance(constant(0.75, 0.25), constant(0.25, 0.75), [[0, 0, 0, 0, 1]], advanced.append)
    assert found.kl == pytest.approx(0.5 * math.log(3))
    assert found.agreement == 0
    # The first token is predicted by nobody; of the four others three are token 0.
    assert found.reference_perplexity == pytest.approx((0.75**3 * 0.25) ** -0.25)
    assert found.perplexity == pytest.approx((0.25**3 * 0.75) ** -0.25)
    assert advanced == [2, 2, 1]


def test_the_corpus_is_there_and_the_same_every_time() -> None:
    found = articles(3, 4000)
    assert len(set(found)) == 3
    assert min(map(len, found)) >= 4000
    assert articles(3, 4000) == found
    with pytest.raises(ValueError, match="articles"):
        articles(1000, 4000)
