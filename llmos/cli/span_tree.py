"""A trace as a tree: who ran inside whom, when, and where nobody says what happened. Values in, values out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

_MIN_GAP = 0.01
_NANO = 1e9


@dataclass(frozen=True, slots=True)
class SpanRow:
    """A finished span. Times are nanoseconds since 1970."""

    span_id: str
    parent_id: str
    name: str
    service: str
    node: str
    start_ns: int
    end_ns: int
    error: str = ""
    links: tuple[str, ...] = ()
    note: str = ""
    """What else is to be said of it."""


@dataclass(frozen=True, slots=True)
class TreeRow:
    """One line of the drawing: a span, or a gap (`span` is None) that no span of its level covers."""

    prefix: str
    """Branches that lead to the line."""
    start_s: float
    """Seconds after the trace's begin."""
    duration_s: float
    span: SpanRow | None = None


@dataclass(slots=True)
class _Node:
    span: SpanRow
    children: list[_Node] = field(default_factory=list)


def draw(spans: Sequence[SpanRow]) -> list[TreeRow]:
    """Lines from the top. A span whose parent is missing (a client's own, or lost) is a root.

    A gap gets a line where siblings leave at least 1 % of the whole trace uncovered.
    """
    if not spans:
        return []
    origin = min(span.start_ns for span in spans)
    whole = max(span.end_ns for span in spans) - origin
    rows: list[TreeRow] = []
    for root in _roots(spans):
        rows.append(_row("", root.span, origin))
        rows.extend(_below(root, "", origin, whole * _MIN_GAP))
    return rows


def covered(spans: Sequence[SpanRow]) -> float:
    """Share of the roots' time, 0 to 1, that spans below them cover; 1 if there is nothing below or no time passed."""
    known = {span.span_id for span in spans}
    roots = [span for span in spans if span.parent_id not in known]
    below = [(span.start_ns, span.end_ns) for span in spans if span.parent_id in known]
    whole = sum(end - start for start, end in _merged([(span.start_ns, span.end_ns) for span in roots]))
    inside = sum(end - start for start, end in _merged(below))
    return min(1.0, inside / whole) if whole and below else 1.0


def _roots(spans: Sequence[SpanRow]) -> list[_Node]:
    nodes = {span.span_id: _Node(span) for span in sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))}
    roots = []
    for node in nodes.values():
        parent = nodes.get(node.span.parent_id)
        if parent is None or parent is node:
            roots.append(node)
        else:
            parent.children.append(node)
    return roots


def _below(node: _Node, prefix: str, origin: int, min_gap_ns: float) -> Iterator[TreeRow]:
    lines: list[_Node | tuple[int, int]] = [*node.children, *_gaps(node, min_gap_ns)]
    lines.sort(key=lambda line: line[0] if isinstance(line, tuple) else line.span.start_ns)
    for number, line in enumerate(lines, 1):
        last = number == len(lines)
        branch, stem = ("└─ ", "   ") if last else ("├─ ", "│  ")
        if isinstance(line, tuple):
            yield TreeRow(prefix + branch, (line[0] - origin) / _NANO, (line[1] - line[0]) / _NANO)
        else:
            yield _row(prefix + branch, line.span, origin)
            yield from _below(line, prefix + stem, origin, min_gap_ns)


def _gaps(node: _Node, min_gap_ns: float) -> list[tuple[int, int]]:
    """Stretches of `node` that no child covers; none for a span without children."""
    if not node.children:
        return []
    span = node.span
    busy = _merged([(child.span.start_ns, child.span.end_ns) for child in node.children])
    edges = [(span.start_ns, span.start_ns), *busy, (span.end_ns, span.end_ns)]
    return [(before[1], after[0]) for before, after in pairwise(edges) if after[0] - before[1] >= max(min_gap_ns, 1)]


def _merged(intervals: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _row(prefix: str, span: SpanRow, origin: int) -> TreeRow:
    return TreeRow(prefix, (span.start_ns - origin) / _NANO, (span.end_ns - span.start_ns) / _NANO, span)
