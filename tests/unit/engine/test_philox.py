"""Philox against the known-answer vectors of Random123 (kat_vectors, philox4x32 with 10 rounds)."""

from __future__ import annotations

import math

import pytest
import torch

from worker.engine.drawing import mass
from worker.engine.philox import gumbel, logarithm, philox4x32, token_words

pytestmark = pytest.mark.torch

KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(seed: int, choice: int, index: int, vocabulary: int = 64) -> list[int]:
    found = token_words(torch.tensor([seed]), torch.tensor([choice]), torch.tensor([index]), vocabulary)
    return found[0].tolist()


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    k0, k1 = (torch.tensor(word) for word in key)
    assert tuple(int(word) for word in philox4x32((c0, c1, c2, c3), (k0, k1))) == expected


def test_a_word_is_that_of_its_own_counter() -> None:
    seed, choice, index, token = 0x299F31D0_A4093822, 3, 17, 10
    block = philox4x32(
        (torch.tensor(token // 4), torch.tensor(index), torch.tensor(choice), torch.tensor(0)),
        (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32)),
    )
    assert words(seed, choice, index)[token] == int(block[token % 4])


def test_a_word_depends_neither_on_the_other_rows_nor_on_the_vocabulary() -> None:
    seeds, choices, indices = torch.tensor([7, -8, 9]), torch.tensor([0, 1, 2]), torch.tensor([5, 6, 7])
    together = token_words(seeds, choices, indices, 101)
    for row in range(3):
        alone = words(int(seeds[row]), int(choices[row]), int(indices[row]), 37)
        assert together[row, :37].tolist() == alone


@pytest.mark.parametrize("other", [(2, 0, 0), (1, 1, 0), (1, 0, 1), (1 + (1 << 40), 0, 0)])
def test_every_part_of_the_key_matters(other: tuple[int, int, int]) -> None:
    assert words(1, 0, 0) != words(*other)


def test_gumbel_is_finite_at_both_ends_and_has_the_right_mean() -> None:
    ends = gumbel(torch.tensor([0, 0xFFFFFFFF]))
    assert torch.isfinite(ends).all()
    assert ends[0] < -3 and ends[1] > 22
    noise = gumbel(torch.tensor(words(11, 0, 0, 40_000)))
    assert math.isclose(float(noise.mean()), 0.5772, abs_tol=0.02)
    assert math.isclose(float(noise.var()), math.pi**2 / 6, abs_tol=0.05)


def test_logarithm_is_off_by_the_last_bit_at_most() -> None:
    x = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(
        -40, 40, dtype=torch.float64
    ).repeat(250)
    assert float(((logarithm(x) - x.log()) / x.log()).abs().max()) < 4e-16
    assert float(logarithm(torch.tensor([1.0], dtype=torch.float64))) == 0.0


def test_masses_are_whole_and_those_of_exp() -> None:
    x = torch.cat([-torch.linspace(0, 22.9, 5000), torch.tensor([-23.1, -1e9, -math.inf])]).double()
    found = mass(x)
    assert torch.equal(found, found.round())
    assert float((found - x.exp() * 2**32).abs().max()) <= 0.6
    assert found[0] == 2**32 and not found[-3:].any()
