"""Rows of a benchmark's table: how a measurement becomes a ratio to a peer and a verdict. Pure."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

HEADINGS = ("case", "ours", "peer", "unit", "ratio", "spread", "target", "ok")
Measure = Callable[[int], float]
"""Takes the number of the round."""
_WIDTHS = (52, 10, 10, 10, 7, 15, 8, 5)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    case: str
    ours: float
    peer: float | None
    """The peer's number; None where ours stands alone."""
    unit: str
    ratio: float | None
    """Median of the rounds' ratios of ours to the peer's (or to the limit); None where there is no peer."""
    target: float | None
    """Bound of the ratio; None: reported only."""
    ok: bool
    """Whether the target is met; True where there is none."""
    spread: tuple[float, float] | None = None
    """Lowest and highest ratio of the rounds, if there were several."""

    def public(self) -> dict[str, str | float | bool | None]:
        """What `--json` prints; null for what is infinite, which JSON does not know."""
        found = {name: getattr(self, name) for name in ("case", "ours", "peer", "unit", "ratio", "target", "ok")}
        return {key: None if value in (math.inf, -math.inf) else value for key, value in found.items()}


def at_least(case: str, unit: str, ours: Sequence[float], peer: Sequence[float], target: float | None) -> Row:
    """Higher is better: the ratio must reach the target. Rounds of both, measured in turn; neither is empty."""
    return _compare(case, unit, ours, peer, target, lambda ratio, bound: ratio >= bound)


def at_most(case: str, unit: str, ours: Sequence[float], peer: Sequence[float], target: float | None) -> Row:
    """Lower is better: the ratio must not exceed the target."""
    return _compare(case, unit, ours, peer, target, lambda ratio, bound: ratio <= bound)


def bounded(case: str, unit: str, value: float, bound: float) -> Row:
    """A number of ours that must not exceed a bound of its own, which stands where else the peer's number does."""
    return Row(case, _rounded(value), bound, unit, _rounded(value / bound), 1.0, value <= bound)


def reported(case: str, unit: str, ours: float, peer: float | None = None) -> Row:
    """Numbers without a target."""
    ratio = None if not peer else _rounded(ours / peer)
    return Row(case, _rounded(ours), None if peer is None else _rounded(peer), unit, ratio, None, True)


def in_turn(rounds: int, measures: Sequence[Measure]) -> list[list[float]]:
    """Results per measure. They alternate, so that what else runs on the machine meets all of them; each is given the
    round's number.
    """
    table = [[measure(number) for measure in measures] for number in range(rounds)]
    return [list(column) for column in zip(*table, strict=True)]


def table(rows: Iterable[Row]) -> str:
    """For people."""
    return "\n".join([_line(HEADINGS), *map(line, rows)])


def line(row: Row) -> str:
    """One row for people."""
    spread = "" if row.spread is None else f"{row.spread[0]:g} to {row.spread[1]:g}"
    return _line((row.case, row.ours, row.peer, row.unit, row.ratio, spread, row.target, row.ok))


def heading() -> str:
    """The line above the rows."""
    return _line(HEADINGS)


def as_json(rows: Iterable[Row]) -> str:
    """One array of objects with case, ours, peer, unit, ratio, target and ok."""
    return json.dumps([row.public() for row in rows], indent=1)


def markdown(rows: Iterable[Row]) -> str:
    """A table for `bench/results`."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    for row in rows:
        spread = "" if row.spread is None else f"{row.spread[0]:g} to {row.spread[1]:g}"
        cells = (row.case, row.ours, row.peer, row.unit, row.ratio, spread, row.target, "yes" if row.ok else "no")
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _compare(
    case: str,
    unit: str,
    ours: Sequence[float],
    peer: Sequence[float],
    target: float | None,
    meets: Callable[[float, float], bool],
) -> Row:
    ratios = [_ratio(mine, theirs) for mine, theirs in zip(ours, peer, strict=True)]
    ratio = statistics.median(ratios)
    return Row(
        case=case,
        ours=_rounded(statistics.median(ours)),
        peer=_rounded(statistics.median(peer)),
        unit=unit,
        ratio=_rounded(ratio),
        target=target,
        ok=target is None or meets(ratio, target),
        spread=(_rounded(min(ratios)), _rounded(max(ratios))) if len(ratios) > 1 else None,
    )


def _ratio(mine: float, theirs: float) -> float:
    """Equal numbers are 1, nothings and infinities too."""
    if mine == theirs:
        return 1.0
    return math.inf if theirs == 0 else mine / theirs


def _rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def _line(cells: Sequence[object]) -> str:
    texts = ["" if cell is None else str(cell) for cell in cells]
    parts = [
        text.ljust(width) if n in (0, 3) else text.rjust(width)
        for n, (text, width) in enumerate(zip(texts, _WIDTHS, strict=True))
    ]
    return " ".join(parts)
