"""A stream with a planted fault is never called whole: a harness that cannot fail proves nothing."""

from __future__ import annotations

import pytest

from tests.faults.clients import Streamed, expected_text
from tests.faults.verdict import STALE, Counts, compare

TEXT = expected_text("p", 3, 60)


@pytest.mark.parametrize(
    ("got", "found"),
    [
        (TEXT, Counts()),
        (TEXT[:20], Counts()),
        (TEXT[:20] + TEXT[25:], Counts(lost=1)),
        (TEXT[:20] + TEXT[12:], Counts(duplicated=8)),
        (TEXT + TEXT[-8:], Counts(duplicated=8)),
        (TEXT[:20] + "~" + TEXT[21:], Counts(corrupted=1)),
        (TEXT[:20] + STALE * 2 + TEXT[22:], Counts(stale_accepted=2)),
    ],
)
def test_what_was_planted_is_found(got: str, found: Counts) -> None:
    assert compare(TEXT, got) == found


def stream(text: str, **more: object) -> Streamed:
    made = Streamed({}, 0, {0: TEXT}, texts={0: text}, finishes={0: "length"}, status=200, ends=1)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def test_a_whole_stream_is_whole() -> None:
    assert stream(TEXT).counts().clean


@pytest.mark.parametrize(
    "damage", [{"ends": 0}, {"ends": 2}, {"finishes": {}}, {"texts": {0: TEXT[:-1]}}, {"broken": "reset", "ends": 0}]
)
def test_a_stream_without_exactly_one_end_is_lost(damage: dict[str, object]) -> None:
    assert stream(TEXT, **damage).counts().lost == 1


def test_a_typed_error_is_an_end() -> None:
    assert stream(TEXT[:30], error="unavailable").counts().clean


def test_events_are_taken_as_they_come() -> None:
    made = Streamed({}, 0, {0: "ab"}, status=200)
    for line in (
        "id: 7",
        'data: {"choices": [{"index": 0, "text": "' + "ab" + '", "finish_reason": "length"}]}',
        "",
        "data: [DONE]",
        "",
        "id: 8",
        "data: {cut",
    ):
        made.take(line)
    assert (made.texts, made.finishes, made.ends, made.last_event_id) == ({0: "ab"}, {0: "length"}, 1, "7")
