"""Tokens that the kernels pick: those of torch, for every instruction set."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from worker.backend import Sampling
from worker.engine import sampling
from worker.engine.sampling import SamplingRow, sample
from worker.kernels import Isa, Kernels

KINDS = (
    Sampling(temperature=0),
    Sampling(temperature=1.0),
    Sampling(temperature=0.01),
    Sampling(temperature=1e-9),
    Sampling(temperature=300.0),
    Sampling(temperature=0.7, top_k=1),
    Sampling(temperature=1.3, top_k=40),
    Sampling(temperature=1.0, top_k=700),
    Sampling(temperature=0.9, top_p=0.95),
    Sampling(temperature=2.0, top_p=0.5),
    Sampling(temperature=1.0, top_p=0.0),
    Sampling(temperature=1.0, top_p=1 - 2**-53),
    Sampling(temperature=1.0, min_p=0.02),
    Sampling(temperature=1.5, min_p=1.0),
    Sampling(temperature=1.1, top_k=50, top_p=0.9, min_p=0.01),
    Sampling(temperature=1.0, presence_penalty=0.4, repetition_penalty=1.2, logit_bias={0: 3.0}),
)


def _rows(barred: frozenset[int] = frozenset()) -> list[SamplingRow]:
    seeds = (number * 0x9E3779B97F4A7C15 & (2**64 - 1) for number in range(len(KINDS)))
    return [
        SamplingRow(dataclasses.replace(kind, seed=seed), number % 3, (0,), (0,) * number, barred)
        for number, (kind, seed) in enumerate(zip(KINDS, seeds, strict=True))
    ]


def _logits(vocabulary: int, kind: str) -> Tensor:
    normal = torch.randn(len(KINDS), vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    match kind:
        case "flat":
            return normal * 0.01
        case "peaked":
            return normal * 8
        case "tied":
            return normal.round()
        case "far":
            return normal * 3 - 5000
    raise ValueError(kind)


def _tokens(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
    return [None if pick is None else pick.token_id for pick in sample(logits, rows)]


def _both(
    logits: Tensor, rows: Sequence[SamplingRow], kernels: Kernels, isa: Isa, patch: pytest.MonkeyPatch
) -> tuple[list[int | None], list[int | None]]:
    """What the kernels pick, and what torch does."""
    patch.setattr(kernels, "isa", isa)
    patch.setattr(sampling, "present", lambda: kernels)
    ours = _tokens(logits, rows)
    patch.setattr(sampling, "present", lambda: None)
    return ours, _tokens(logits, rows)


@pytest.mark.parametrize("vocabulary", [1, 4, 63, 64, 65, 1000, 5003])
@pytest.mark.parametrize("kind", ["flat", "peaked", "tied", "far"])
def test_tokens_are_those_of_torch(
    loaded: Kernels, isa: Isa, vocabulary: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    barred = frozenset(range(1, vocabulary, 3))
    for rows in (_rows(), _rows(barred)):
        ours, theirs = _both(_logits(vocabulary, kind), rows, loaded, isa, monkeypatch)
        assert ours == theirs
        assert None not in ours


def test_many_draws_from_a_large_vocabulary(loaded: Kernels, isa: Isa, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(1, 49152, generator=torch.Generator().manual_seed(1)) * 3
    kinds = (Sampling(), Sampling(temperature=0.8, top_p=0.95), Sampling(top_k=100, top_p=0.99))
    rows = [SamplingRow(dataclasses.replace(kinds[n % 3], seed=n), 0, (), (7,) * n) for n in range(24)]
    ours, theirs = _both(logits.expand(len(rows), -1), rows, loaded, isa, monkeypatch)
    assert ours == theirs
    assert len(set(ours)) > 15


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 7, 69])
def test_rows_that_are_not_numbers_get_none(
    loaded: Kernels, isa: Isa, poison: float, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = _logits(70, "peaked")
    logits[3, place] = logits[-1, place] = poison
    logits[5] = -math.inf
    for rows in (_rows(), _rows(frozenset({place}))):
        ours, theirs = _both(logits, rows, loaded, isa, monkeypatch)
        assert ours == theirs
        assert [number for number, token in enumerate(ours) if token is None] == [3, 5, len(KINDS) - 1]


def test_threads_share_the_rows_and_change_none(threads: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "present", lambda: threads)
    logits, rows = _logits(5003, "peaked"), _rows()
    picks = []
    for count in (1, 2, 3):
        threads.set_threads(count)
        picks.append(_tokens(logits, rows))
    assert picks[0] == picks[1] == picks[2]
