"""The curve of `bench.detection` as SVG: delay until a stall is noticed against false alarms. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 400, 70, 60
_COLOURS = {"ours": "#1667c0", "fixed": "#c0392b"}
_LABELS = {"ours": "learned", "fixed": "fixed timeout"}
_LEAST = 0.003
"""Where no false alarm is drawn: logarithms know no zero."""
_MOST = 30.0
_DELAYS = (0.2, 200.0)


@dataclass(frozen=True, slots=True)
class Point:
    """One detector."""

    kind: str
    """`ours` or `fixed`."""
    name: str
    false: float
    """False alarms per 1000 stages and gaps."""
    delay_s: float
    """Median."""


def picture(points: Sequence[Point]) -> str:
    """A picture that needs no fonts, scripts or styles of others."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        *_axes(),
    ]
    for kind, colour in _COLOURS.items():
        found = sorted((_x(one.false), _y(one.delay_s), one.name) for one in points if one.kind == kind)
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in found)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for x, y, name in found:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
            parts.append(f'<text x="{x + 7:.1f}" y="{y - 5:.1f}" fill="{colour}">{name}</text>')
    for row, (kind, colour) in enumerate(_COLOURS.items()):
        y = 24 + 18 * row
        parts.append(f'<circle cx="{_WIDTH - 130}" cy="{y}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{_WIDTH - 120}" y="{y + 4}">{_LABELS[kind]}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _axes() -> list[str]:
    right, floor = _WIDTH - 20, _HEIGHT - _BOTTOM
    parts = [f'<path d="M{_LEFT},15 V{floor} H{right}" fill="none" stroke="black"/>']
    for value, label in ((_LEAST, "none"), (0.01, "0.01"), (0.1, "0.1"), (1.0, "1"), (10.0, "10")):
        parts.append(f'<text x="{_x(value):.1f}" y="{floor + 18}" text-anchor="middle">{label}</text>')
    for value in (0.3, 1.0, 3.0, 10.0, 30.0, 100.0):
        y = _y(value)
        parts.append(f'<path d="M{_LEFT},{y:.1f} H{right}" stroke="#dddddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 14}" text-anchor="middle">false alarms per 1000 stages</text>')
    centre = floor / 2
    parts.append(
        f'<text x="18" y="{centre}" text-anchor="middle" transform="rotate(-90 18 {centre})">'
        "median seconds until a stall is noticed</text>"
    )
    return parts


def _x(false: float) -> float:
    share = math.log(max(_LEAST, min(_MOST, false)) / _LEAST) / math.log(_MOST / _LEAST)
    return _LEFT + 15 + share * (_WIDTH - _LEFT - 60)


def _y(delay_s: float) -> float:
    low, high = _DELAYS
    share = math.log(max(low, min(high, delay_s)) / low) / math.log(high / low)
    return (_HEIGHT - _BOTTOM) - share * (_HEIGHT - _BOTTOM - 20)
