from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmos.cli.span_tree import SpanRow, covered, draw

MS = 1_000_000


def span(name: str, parent: str, start_ms: int, end_ms: int, **more: object) -> SpanRow:
    return SpanRow(name, parent, name, "gateway", "g1", start_ms * MS, end_ms * MS, **more)  # type: ignore[arg-type]


REQUEST = [
    span("decode", "attempt", 30, 100),
    span("chat", "outside", 0, 100),
    span("attempt", "chat", 10, 100),
    span("prefill", "attempt", 10, 30),
    span("queue", "chat", 0, 10),
]


def lines(spans: list[SpanRow]) -> list[str]:
    return [f"{row.prefix}{row.span.name if row.span else 'gap'}" for row in draw(spans)]


def test_children_follow_their_parent_in_order_of_time() -> None:
    assert lines(REQUEST) == ["chat", "├─ queue", "└─ attempt", "   ├─ prefill", "   └─ decode"]


def test_times_count_from_the_first_span() -> None:
    rows = {row.span.name: row for row in draw([span("a", "", 500, 900), span("b", "a", 600, 800)]) if row.span}
    assert (rows["b"].start_s, rows["b"].duration_s) == (0.1, 0.2)


def test_a_gap_is_drawn_where_siblings_leave_time() -> None:
    spans = [span("root", "", 0, 100), span("a", "root", 0, 20), span("b", "root", 50, 100)]
    gaps = [(row.start_s, row.duration_s) for row in draw(spans) if row.span is None]
    assert gaps == [(0.02, 0.03)]


def test_a_gap_below_one_percent_is_not_drawn() -> None:
    spans = [span("root", "", 0, 1000), span("a", "root", 0, 500), span("b", "root", 505, 1000)]
    assert lines(spans) == ["root", "├─ a", "└─ b"]


def test_a_span_without_children_has_no_gap() -> None:
    assert lines([span("root", "", 0, 100)]) == ["root"]


def test_a_lost_parent_makes_its_children_roots() -> None:
    assert lines([span("a", "lost", 0, 5), span("b", "lost", 5, 9)]) == ["a", "b"]


def test_nothing_to_draw() -> None:
    assert draw([]) == []
    assert covered([]) == 1.0


def test_covered_counts_overlap_once() -> None:
    spans = [span("root", "", 0, 100), span("a", "root", 0, 60), span("b", "root", 40, 80)]
    assert covered(spans) == 0.8


def test_an_instant_trace_counts_as_covered() -> None:
    assert covered([span("root", "", 5, 5), span("a", "root", 5, 5)]) == 1.0


SPANS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(-1, 30), st.integers(0, 100), st.integers(0, 100)), max_size=25
)


@given(SPANS)
def test_every_span_shows_once_unless_a_cycle_hides_it(drawn: list[tuple[int, int, int, int]]) -> None:
    """Parents with a lower number than their children: no cycle, as W3C ids give none."""
    unique = {number: (parent, start, length) for number, parent, start, length in drawn if parent < number}
    spans = [
        span(str(number), str(parent), start, start + length) for number, (parent, start, length) in unique.items()
    ]
    shown = [row.span.span_id for row in draw(spans) if row.span]
    assert sorted(shown) == sorted(str(number) for number in unique)
    assert 0 <= covered(spans) <= 1
