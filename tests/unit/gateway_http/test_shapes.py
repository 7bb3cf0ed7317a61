"""OpenAI's shapes, event by event."""

from __future__ import annotations

from gateway.http.shapes import ChatShape, CompletionShape
from gateway.types import Delta, Done, Started, TokenLogprob

STARTED = Started("r1", "tiny", "v1", 42, 1_700_000_000, 5)


def logprob(raw: bytes, value: float = -0.5, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
    return TokenLogprob(1, raw.decode(errors="replace"), raw, value, top)


def test_the_event_id_tells_what_a_client_holds_of_each_choice() -> None:
    shape = ChatShape()
    shape.start(STARTED)
    assert shape.is_new(1)
    shape.opening(1)
    assert not shape.is_new(1)
    assert shape.event_id() == "1:0:0"
    shape.chunk(Delta(1, 0, "ab", (7, 8, 9)))
    shape.chunk(Delta(0, 0, "é", (7,)))
    shape.chunk(Delta(1, 3, "", (4,)))
    assert shape.event_id() == "0:1:1,1:4:2"


def test_resumed_streams_count_tokens_from_where_they_go_on() -> None:
    shape = ChatShape()
    shape.start(STARTED)
    shape.chunk(Delta(0, 10, "ab", (7, 8)))
    assert shape.event_id() == "0:12:2"


def test_text_offsets_count_characters_even_where_a_token_ends_inside_one() -> None:
    shape = CompletionShape(logprobs=True)
    shape.start(STARTED)
    snowman = "☃".encode()
    entries = (logprob(b"a"), logprob(snowman[:1]), logprob(snowman[1:]), logprob(b"bc"), logprob(b"d"))
    choice = shape.chunk(Delta(0, 0, "a☃bcd", (1, 2, 3, 4, 5), entries))["choices"][0]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 2, 4]
    later = shape.chunk(Delta(0, 5, "e", (6,), (logprob(b"e"),)))["choices"][0]
    assert later["logprobs"]["text_offset"] == [5]


def test_impossible_tokens_have_a_finite_logprob() -> None:
    shape = ChatShape(logprobs=True)
    shape.start(STARTED)
    top = (logprob(b"x", float("-inf")), logprob(b"y", float("nan")))
    choice = shape.chunk(Delta(0, 0, "x", (1,), (logprob(b"x", -1.0, top),)))["choices"][0]
    (entry,) = choice["logprobs"]["content"]
    assert entry["logprob"] == -1.0
    assert [other["logprob"] for other in entry["top_logprobs"]] == [-9999.0, -9999.0]
    assert entry["bytes"] == [120]


def test_usage_is_null_until_the_last_chunk_if_asked_for_and_absent_otherwise() -> None:
    asked, not_asked = ChatShape(include_usage=True), ChatShape()
    for shape in (asked, not_asked):
        shape.start(STARTED)
    assert asked.chunk(Delta(0, 0, "x", (1,)))["usage"] is None
    assert "usage" not in not_asked.chunk(Delta(0, 0, "x", (1,)))
    assert not_asked.usage_chunk(Done(1, 2, 1)) is None
    last = asked.usage_chunk(Done(3, 4, 1))
    assert last is not None
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_whole_answers_join_the_deltas_of_each_choice_in_order() -> None:
    shape = CompletionShape(logprobs=True)
    shape.start(STARTED)
    deltas = {
        1: [Delta(1, 0, "b", (1,), (logprob(b"b"),), "length")],
        0: [Delta(0, 0, "a", (1,), (logprob(b"a"),)), Delta(0, 1, "c", (2,), (logprob(b"c"),), "stop")],
    }
    answer = shape.whole(deltas, Done(2, 3))
    assert answer["object"] == "text_completion"
    assert answer["id"] == "cmpl-r1"
    assert [(choice["index"], choice["text"], choice["finish_reason"]) for choice in answer["choices"]] == [
        (0, "ac", "stop"),
        (1, "b", "length"),
    ]
    assert answer["choices"][0]["logprobs"]["text_offset"] == [0, 1]
