"""From measurements to rows."""

from __future__ import annotations

import json

import pytest

from bench import rows
from bench.rows import Row, at_least, at_most, bounded, in_turn, reported


def test_the_ratio_is_the_median_of_the_rounds_ratios() -> None:
    row = at_least("decode", "tokens/s", [10.0, 30.0, 40.0], [10.0, 10.0, 20.0], 1.5)

    assert (row.ours, row.peer, row.ratio, row.spread, row.ok) == (30.0, 10.0, 2.0, (1.0, 3.0), True)


@pytest.mark.parametrize(("ratio", "higher", "lower"), [(0.9, False, True), (1.0, True, True), (1.1, True, False)])
def test_a_target_is_met_from_its_side(ratio: float, higher: bool, lower: bool) -> None:
    assert at_least("speed", "tokens/s", [ratio], [1.0], 1.0).ok is higher
    assert at_most("gap", "ms", [ratio], [1.0], 1.0).ok is lower


def test_without_a_target_a_row_is_ok() -> None:
    assert at_least("speed", "tokens/s", [1.0], [2.0], None).ok
    assert reported("KL", "nats", 0.002, 0.004) == Row("KL", 0.002, 0.004, "nats", 0.5, None, True)


def test_a_bound_of_its_own_stands_for_the_peer() -> None:
    assert bounded("KL", "nats", 0.006, 0.005) == Row("KL", 0.006, 0.005, "nats", 1.2, 1.0, False)


def test_sides_take_turns() -> None:
    calls: list[tuple[str, int]] = []

    def side(name: str, base: float) -> rows.Measure:
        def measure(number: int) -> float:
            calls.append((name, number))
            return base + number

        return measure

    assert in_turn(2, [side("ours", 10.0), side("peer", 20.0)]) == [[10.0, 11.0], [20.0, 21.0]]
    assert calls == [("ours", 0), ("peer", 0), ("ours", 1), ("peer", 1)]


def test_json_has_the_agreed_keys_only() -> None:
    (row,) = json.loads(rows.as_json([at_least("decode", "tokens/s", [2.0], [1.0], 1.5)]))

    assert list(row) == ["case", "ours", "peer", "unit", "ratio", "target", "ok"]
    assert row["ok"] is True


def test_tables_show_the_spread() -> None:
    row = at_least("decode", "tokens/s", [1.0, 3.0], [1.0, 1.0], None)

    assert "1 to 3" in rows.line(row)
    assert "| decode | 2.0 | 1.0 | tokens/s | 2.0 | 1 to 3 |  | yes |" in rows.markdown([row])


def test_nothing_against_nothing_is_even_and_infinity_is_no_json() -> None:
    assert at_least("goodput", "tokens/s", [0.0], [0.0], 1.0).ratio == 1.0
    row = at_least("goodput", "tokens/s", [5.0], [0.0], 1.0)

    assert row.ok
    assert row.public()["ratio"] is None
