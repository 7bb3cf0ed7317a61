"""A trace as SVG: a bar per span, indented as they lie in one another, with what went wrong beside it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from llmos.cli.span_tree import SpanRow, TreeRow, draw

_ROW, _TOP, _WIDTH, _LABELS, _MARGIN = 24, 44, 1100, 300, 20
_INDENT, _BRANCH = 14, 3
"""Pixels a level, and characters of a level's branches."""
_CHAR = 6.2
"""Pixels of a character, roughly."""
_COLOURS = {"gateway": "#1667c0", "scheduler": "#7d3c98", "worker": "#1e8449"}
_OTHER, _BROKEN, _GAP = "#7f8c8d", "#c0392b", "#d5d8dc"
_TICKS = 5


def picture(spans: Sequence[SpanRow], title: str) -> str:
    """A picture that needs no fonts, scripts or styles of others. Raises ValueError without spans."""
    if not spans:
        raise ValueError("there are no spans to draw")
    rows = draw(spans)
    whole_s = max(row.start_s + row.duration_s for row in rows) or 1e-9
    height = _TOP + _ROW * len(rows) + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{_MARGIN}" y="22" font-size="14">{escape(title)}</text>',
        *_services({row.span.service for row in rows if row.span is not None}),
        *_axis(whole_s, height),
    ]
    for number, row in enumerate(rows):
        parts.extend(_line(row, _TOP + _ROW * number, whole_s))
    return "\n".join([*parts, "</svg>", ""])


def _services(names: set[str]) -> list[str]:
    parts, x = [], float(_WIDTH - _MARGIN)
    for name in sorted(names, reverse=True):
        x -= _CHAR * len(name) + 26
        parts.append(f'<rect x="{x:.0f}" y="12" width="12" height="12" fill="{_COLOURS.get(name, _OTHER)}"/>')
        parts.append(f'<text x="{x + 17:.0f}" y="22">{escape(name)}</text>')
    return parts


def _axis(whole_s: float, height: int) -> list[str]:
    floor, parts = height - 36, []
    for tick in range(_TICKS + 1):
        at_s = whole_s * tick / _TICKS
        x = _x(at_s, whole_s)
        parts.append(f'<path d="M{x:.1f},{_TOP - 8} V{floor}" stroke="#e5e7e9"/>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{at_s:.3g} s</text>')
    return parts


def _line(row: TreeRow, top: int, whole_s: float) -> list[str]:
    span = row.span
    x = _x(row.start_s, whole_s)
    width = max(2.0, _x(row.start_s + row.duration_s, whole_s) - x)
    indent = _MARGIN + _INDENT * (len(row.prefix) // _BRANCH)
    colour = _GAP if span is None else _COLOURS.get(span.service, _OTHER)
    edge = f' stroke="{_BROKEN}" stroke-width="2"' if span is not None and span.error else ""
    name = "(nobody says)" if span is None else span.name
    base = top + 12
    parts = [
        f'<text x="{indent}" y="{base}">{escape(name)}</text>',
        f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="16" rx="2" fill="{colour}"{edge}>'
        f"<title>{escape(name)}: {row.duration_s:.3f} s</title></rect>",
    ]
    if span is not None and (said := _said(span)):
        parts.append(_beside(said, x, width, base, _BROKEN if span.error else "black"))
    return parts


def _said(span: SpanRow) -> str:
    return ": ".join(part for part in (span.note, span.error) if part)


def _beside(said: str, x: float, width: float, base: int, colour: str) -> str:
    """Behind the bar, else before it, else on it: where there is room."""
    needed = _CHAR * len(said)
    if x + width + 6 + needed <= _WIDTH - _MARGIN:
        return f'<text x="{x + width + 6:.1f}" y="{base}" fill="{colour}">{escape(said)}</text>'
    if x - 6 - needed >= _LABELS:
        return f'<text x="{x - 6:.1f}" y="{base}" fill="{colour}" text-anchor="end">{escape(said)}</text>'
    most = int((_WIDTH - _MARGIN - max(x, _LABELS) - 10) / _CHAR)
    short = said if len(said) <= most else said[: max(0, most - 1)] + "…"
    return f'<text x="{x + 5:.1f}" y="{base}" fill="white">{escape(short)}</text>'


def _x(at_s: float, whole_s: float) -> float:
    return _LABELS + at_s / whole_s * (_WIDTH - _LABELS - _MARGIN)
