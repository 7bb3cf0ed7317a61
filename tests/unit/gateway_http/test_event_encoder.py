"""One event per token, with the same bytes however the tokens came and whichever way they were encoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.http.event_encoder import EventEncoder
from gateway.http.shapes import ChatShape, CompletionShape, Shape
from gateway.http.sse import event
from gateway.types import Delta, Finish, Started, TokenLogprob

STARTED = Started("r1", "tiny", "v1", 42, 1_700_000_000, 5)


def started(shape: Shape) -> Shape:
    shape.start(STARTED)
    return shape


def grouped(parts: Sequence[str], sizes: Sequence[int], finish: Finish, rest: str) -> Iterator[Delta]:
    """Deltas of one choice: groups of `sizes` tokens, again and again; the last one ends it and brings `rest`."""
    at = 0
    for size in [*sizes, *[1] * len(parts)]:
        group = parts[at : at + size]
        if group:
            last = at + len(group) == len(parts)
            text = "".join(group) + (rest if last else "")
            yield Delta(0, at, text, tuple(range(len(group))), (), finish if last else None, parts=group)
        at += len(group)


def singly(shape: Shape, parts: Sequence[str], finish: Finish, rest: str) -> bytes:
    """What a shape's chunks give, token by token."""
    said = []
    for delta in grouped(parts, [], finish, rest):
        opening = shape.opening(0) if shape.is_new(0) else None
        if opening is not None:
            said.append(event(opening, shape.event_id()))
        chunk = shape.chunk(delta)
        if delta.text or delta.finish:
            said.append(event(chunk, shape.event_id()))
    return b"".join(said)


@pytest.mark.parametrize("kind", [ChatShape, CompletionShape])
@pytest.mark.parametrize("usage", [False, True])
@given(
    parts=st.lists(st.text(max_size=3), min_size=1, max_size=12),
    sizes=st.lists(st.integers(1, 5), max_size=5),
    finish=st.sampled_from(["stop", "length"]),
    rest=st.text(max_size=2),
)
def test_grouping_does_not_show(
    kind: type[Shape], usage: bool, parts: list[str], sizes: list[int], finish: Finish, rest: str
) -> None:
    encoder = EventEncoder(started(kind(include_usage=usage)))
    sent = b"".join(map(encoder.encode, grouped(parts, sizes, finish, rest)))
    assert sent == singly(started(kind(include_usage=usage)), parts, finish, rest)


def test_ids_name_all_choices_that_have_begun() -> None:
    encoder = EventEncoder(started(ChatShape()))
    assert encoder.encode(Delta(1, 0, "ab", (1, 2), parts=("a", "b"))).count(b"data: ") == 3
    second = encoder.encode(Delta(0, 0, "é", (1,), parts=("é",)))
    assert [line for line in second.split(b"\n") if line.startswith(b"id: ")] == [
        b"id: 0:0:0,1:2:2",
        b"id: 0:1:1,1:2:2",
    ]


def test_each_event_has_its_own_tokens_likelihood() -> None:
    shape = started(CompletionShape(logprobs=True))
    entries = tuple(TokenLogprob(1, text, text.encode(), -0.5) for text in "ab")
    sent = EventEncoder(shape).encode(Delta(0, 0, "ab", (1, 1), entries, "length", parts=("a", "b")))
    assert sent.count(b"data: ") == 2
    assert b'"tokens":["a"],"token_logprobs":[-0.5],"top_logprobs":[{}],"text_offset":[0]' in sent
    assert b'"text_offset":[1]},"finish_reason":"length"' in sent


def test_a_delta_whose_parts_are_not_known_is_one_event() -> None:
    encoder = EventEncoder(started(CompletionShape()))
    assert encoder.encode(Delta(0, 7, "rest", (), (), None)).count(b"data: ") == 1
