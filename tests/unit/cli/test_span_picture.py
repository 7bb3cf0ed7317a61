"""A trace as SVG: it parses, has a bar for each line, says what went wrong, and stays inside itself."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.cli.span_picture import picture
from llmos.cli.span_tree import SpanRow, draw

MS = 1_000_000
SVG = "{http://www.w3.org/2000/svg}"


def span(name: str, parent: str, start_ms: int, end_ms: int, **more: str) -> SpanRow:
    service = more.pop("service", "scheduler")
    return SpanRow(name, parent, name, service, "s1", start_ms * MS, end_ms * MS, **more)  # type: ignore[arg-type]


MOVED = [
    span("chat <m>", "", 0, 1000, service="gateway"),
    span("first", "chat <m>", 0, 400, error="no token for 0.3 s & more", note="on w1"),
    span("second", "chat <m>", 600, 1000, note="on w2"),
]


def bars(svg: str) -> list[ET.Element]:
    return [one for one in ET.fromstring(svg).iter(f"{SVG}rect") if one.find(f"{SVG}title") is not None]


def words(svg: str) -> list[str]:
    return [one.text or "" for one in ET.fromstring(svg).iter(f"{SVG}text")]


def test_each_line_of_the_tree_has_a_bar_where_it_lay() -> None:
    found = bars(picture(MOVED, "Request r<1>"))
    assert len(found) == len(draw(MOVED)) == 4  # one gap
    whole, first, _, second = [(float(one.get("x", 0)), float(one.get("width", 0))) for one in found]
    assert first[1] == pytest.approx(0.4 * whole[1], abs=0.2)
    assert second[0] + second[1] == pytest.approx(whole[0] + whole[1], abs=0.2)


def test_what_went_wrong_stands_beside_its_bar() -> None:
    said = words(picture(MOVED, "Request r<1>"))
    assert "on w1: no token for 0.3 s & more" in said
    assert "Request r<1>" in said and "chat <m>" in said


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="no spans"):
        picture([], "nothing")


@given(
    st.lists(
        st.tuples(st.integers(0, 500), st.integers(0, 500), st.text(st.characters(codec="ascii", min_codepoint=32))),
        min_size=1,
        max_size=8,
    )
)
def test_whatever_is_said_the_picture_parses_and_bars_lie_inside(spans: list[tuple[int, int, str]]) -> None:
    rows = [span(f"s{n}", "", start, start + length, error=said) for n, (start, length, said) in enumerate(spans)]
    svg = picture(rows, "t")
    width = float(ET.fromstring(svg).get("viewBox", "").split()[2])
    for bar in bars(svg):
        assert 0 <= float(bar.get("x", 0)) <= float(bar.get("x", 0)) + float(bar.get("width", 0)) <= width
