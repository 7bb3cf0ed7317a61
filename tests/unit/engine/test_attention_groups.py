"""Which rows share an attention call."""

from __future__ import annotations

import random

import pytest

from worker.engine.attention import group_rows

pytestmark = pytest.mark.torch

LIMIT = 100_000


def padded(lengths: list[int], group: list[int]) -> int:
    return len(group) * -(-max(lengths[number] for number in group) // 64) * 64


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_in_one_group_and_padding_is_bounded(seed: int) -> None:
    source = random.Random(seed)
    lengths = [source.randint(1, 10 ** source.randint(1, 4)) for _ in range(source.randint(1, 200))]
    groups = group_rows(lengths, LIMIT)
    assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
    for group in groups:
        own = sum(-(-lengths[number] // 64) * 64 for number in group)
        assert padded(lengths, group) <= max(2048, 1.25 * own)
        assert padded(lengths, group) <= LIMIT or len(group) == 1


def test_a_prefill_chunk_is_a_handful_of_groups() -> None:
    assert len(group_rows(list(range(1, 129)), LIMIT)) <= 2
    assert len(group_rows(list(range(897, 1025)), 1 << 20)) == 1


def test_one_long_row_does_not_widen_the_short_ones() -> None:
    assert group_rows([10, 8000, 30, 20], LIMIT) == [[0, 3, 2], [1]]


def test_a_row_beyond_the_limit_stands_alone() -> None:
    assert group_rows([500, 500, 500], 100) == [[0], [1], [2]]
