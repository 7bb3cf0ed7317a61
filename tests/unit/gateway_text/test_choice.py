"""Stop strings, and the promise that the grouping of tokens changes nothing."""

from __future__ import annotations

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from gateway.text.choice import ChoiceText
from gateway.text.stops import StopMatcher
from gateway.text.tokenizer import ByteTokenizer

ALPHABET = "abé"
TEXT = st.text(alphabet=ALPHABET, max_size=24)
STOPS = st.lists(st.text(alphabet=ALPHABET, min_size=1, max_size=4), max_size=4)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition, by brute force: the first end of any stop string cuts the text at that string's beginning."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def chunks(items: list[int], cuts: list[int]) -> list[list[int]]:
    edges = [0, *sorted(cut % (len(items) + 1) for cut in cuts), len(items)]
    return [items[left:right] for left, right in itertools.pairwise(edges)]


def run(pieces: list[list[int]], stops: list[str]) -> tuple[str, int, bool]:
    choice = ChoiceText(ByteTokenizer().detokenizer(continuation=False), stops)
    text, taken = "", 0
    for piece in pieces:
        got = choice.push(piece)
        text, taken = text + got.text, taken + got.taken
        if got.stopped:
            return text, taken, True
    last = choice.end()
    return text + last.text, taken, last.stopped


@given(TEXT, STOPS, st.lists(st.integers(0, 60), max_size=6))
def test_any_grouping_gives_the_text_before_the_first_stop_string(text: str, stops: list[str], cuts: list[int]) -> None:
    tokens = list(text.encode())
    got, taken, stopped = run(chunks(tokens, cuts), stops)
    assert (got, stopped) == expected(text, stops)
    assert (got, taken, stopped) == run([tokens], stops)


@given(TEXT, STOPS)
def test_what_is_delivered_early_is_never_taken_back(text: str, stops: list[str]) -> None:
    whole, _ = expected(text, stops)
    matcher, delivered = StopMatcher(stops), ""
    for character in text:
        delivered += matcher.push(character)
        assert whole.startswith(delivered)
        if matcher.matched:
            return


@example("abé", ["abé", "b"], [])
@given(TEXT, STOPS, st.lists(st.integers(0, 60), max_size=6))
def test_pieces_of_many_characters_change_nothing(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher, got = StopMatcher(stops), ""
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for left, right in itertools.pairwise(edges):
        if not matcher.matched:
            got += matcher.push(text[left:right])
    got += "" if matcher.matched else matcher.flush()
    assert (got, matcher.matched) == expected(text, stops)


@given(TEXT, TEXT, STOPS)
def test_a_resumed_choice_goes_on_where_it_was(before: str, after: str, stops: list[str]) -> None:
    tokens = list((before + after).encode())
    cut = len(before.encode())
    whole = run([tokens], stops)
    again = ChoiceText(ByteTokenizer().detokenizer(continuation=False), stops)
    held = again.push(tokens[:cut])
    if held.stopped:
        assert (held.text, held.taken, True) == whole
        return
    rest = again.push(tokens[cut:])
    text = held.text + rest.text + ("" if rest.stopped else again.end().text)
    assert text == whole[0]


def test_the_token_that_completes_a_stop_string_is_the_last_one_taken() -> None:
    choice = ChoiceText(ByteTokenizer().detokenizer(continuation=False), ["END"])
    piece = choice.push(list(b"xENDyz"))
    assert (piece.text, piece.taken, piece.stopped) == ("x", 4, True)


def test_a_possible_stop_string_is_held_back_and_flushed() -> None:
    choice = ChoiceText(ByteTokenizer().detokenizer(continuation=False), ["END"])
    assert choice.push(list(b"xEN")).text == "x"
    assert choice.end().text == "EN"


def test_a_replaced_last_character_can_complete_a_stop_string() -> None:
    choice = ChoiceText(ByteTokenizer().detokenizer(continuation=False), ["\ufffd"])
    assert choice.push([0x61, 0xC3]).text == "a"
    last = choice.end()
    assert (last.text, last.stopped) == ("", True)
