"""Growth is told from noise."""

from __future__ import annotations

import random

import pytest

from scheduler.slope import theil_sen


def test_a_line_is_found_exactly_and_through_wild_points() -> None:
    line = [(float(x), 3.0 * x + 1) for x in range(20)]
    assert theil_sen(line).median == pytest.approx(3.0)
    wild = [(x, 1e9 if x in (3, 7, 11, 15) else y) for x, y in line]
    assert theil_sen(wild).median == pytest.approx(3.0, rel=0.3)


def test_without_two_different_places_there_is_no_slope() -> None:
    assert theil_sen([]).certain == theil_sen([(1.0, 2.0), (1.0, 5.0)]).certain == 0.0


def test_noise_alone_is_almost_never_called_growth() -> None:
    rng = random.Random(5)
    series = [[(float(x), rng.gauss(100, 10)) for x in range(30)] for _ in range(200)]
    assert sum(theil_sen(points).certain > 0 for points in series) <= 2


def test_growth_below_the_noise_of_one_point_is_seen() -> None:
    rng = random.Random(5)
    series = [[(float(x), 1.5 * x + rng.gauss(100, 10)) for x in range(40)] for _ in range(50)]
    found = [theil_sen(points).certain for points in series]
    assert sum(slope > 0 for slope in found) >= 48
    assert sum(0.7 < slope < 2.5 for slope in found) >= 45


def test_a_step_is_no_growth() -> None:
    assert theil_sen([(float(x), 100.0 if x < 15 else 200.0) for x in range(30)]).median <= 100 / 15
    assert theil_sen([(float(x), 100.0 if x < 4 else 200.0) for x in range(30)]).certain == 0.0
