"""The text that quality is measured on."""

from __future__ import annotations

import pytest

from bench import corpus


def test_docstrings_come_from_the_source() -> None:
    found = list(corpus.docstrings("textwrap"))

    assert found == list(corpus.docstrings("textwrap"))
    assert found[0] == "Text wrapping and filling."
    assert any(doc.startswith("wrap(text : string) -> [string]") for doc in found), "a method's"


def test_windows_are_spread_and_do_not_overlap() -> None:
    assert corpus.windows(range(10), 2, 3) == [[0, 1, 2], [5, 6, 7]]
    assert corpus.windows(range(10), 2, 3, first=[99]) == [[99, 0, 1], [99, 5, 6]]


@pytest.mark.parametrize(("count", "length"), [(4, 3), (0, 3), (2, 1)])
def test_windows_that_the_text_does_not_hold_are_refused(count: int, length: int) -> None:
    with pytest.raises(ValueError, match="do not hold"):
        corpus.windows(range(10), count, length, first=[99] if length == 1 else [])
