"""Texts and pairs become tokens as the library makes them, cut only where that was asked for."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from gateway.text.tokenizer import ByteTokenizer, HfTokenizer, Tokenizer
from gateway.transcript import Verdict
from gateway.values import ValuesTranscript
from llmos.errors import InvalidRequest
from llmos.internal.v1 import request_pb2
from llmos.v1 import inference_pb2

WORDS = {word: number for number, word in enumerate(["<s>", "</s>", "<u>", "a", "b", "c", "d"])}


def make(pair: str) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<u>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair=pair, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return made


KINDS = make("<s> $A </s> $B:1 </s>:1")
NO_KINDS = make("<s> $A </s> </s> $B </s>")
texts = st.lists(st.sampled_from(["a", "b", "c", "x"]), min_size=1, max_size=6).map(" ".join)


def reader(library: tokenizers.Tokenizer) -> Tokenizer:
    return HfTokenizer(library.to_str().encode())


@given(texts, texts)
def test_whole_texts_and_pairs(first: str, second: str) -> None:
    for library in (KINDS, NO_KINDS):
        assert reader(library).encode_task(first, None, None) == (library.encode(first).ids, 0)
        ids, second_at = reader(library).encode_task(first, second, None)
        pair = library.encode(first, second)
        assert ids == pair.ids
        assert second_at == pair.sequence_ids.index(1)


@given(texts, texts, st.integers(1, 16))
def test_the_end_is_cut(first: str, second: str, limit: int) -> None:
    tokenizer = reader(KINDS)
    whole, _ = tokenizer.encode_task(first, None, None)
    if limit >= len(whole):
        assert tokenizer.encode_task(first, None, limit)[0] == whole
    elif limit > 2:
        assert tokenizer.encode_task(first, None, limit)[0] == [*whole[: limit - 1], 1]
    else:
        with pytest.raises(InvalidRequest):
            tokenizer.encode_task(first, None, limit)
    pair, at = tokenizer.encode_task(first, second, None)
    if at + 1 < limit < len(pair):
        assert tokenizer.encode_task(first, second, limit) == ([*pair[: limit - 1], 1], at)


def test_a_second_text_without_tokens_still_begins_somewhere() -> None:
    assert reader(KINDS).encode_task("a", " ", None) == ([0, 3, 1, 1], 3)
    assert reader(NO_KINDS).encode_task("a", " ", None)[1] == 5


def test_bytes() -> None:
    assert ByteTokenizer().encode_task("ab", None, 1) == ([97], 0)
    assert ByteTokenizer().encode_task("ab", "cde", 4) == ([97, 98, 99, 100], 2)


def test_half_of_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        reader(KINDS).encode_task("a", "\ud800", None)


def output(values: list[float], attempt: int = 1, **fields: object) -> request_pb2.Output:
    made = request_pb2.Output(
        request_id="r",
        epoch=request_pb2.Epoch(term=1, attempt=attempt),
        values=values,
        finish_reason=inference_pb2.FINISH_REASON_STOP,
    )
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_values_are_taken_once() -> None:
    transcript = ValuesTranscript(2)
    taken = transcript.take(output([0.5, 1.5], attempt=2))
    assert taken.verdict is Verdict.TAKEN
    assert taken.delta is not None
    assert list(taken.delta.values) == [0.5, 1.5]
    assert transcript.finished
    assert transcript.take(output([0.5, 1.5], attempt=2)).verdict is Verdict.DUPLICATE
    assert transcript.take(output([9.0, 9.0], attempt=1)).verdict is Verdict.STALE


@pytest.mark.parametrize(
    "broken",
    [
        output([0.5]),
        output([0.5, float("nan")]),
        output([0.5, 1.0], index=1),
        output([0.5, 1.0], choice=1),
        output([0.5, 1.0], finish_reason=inference_pb2.FINISH_REASON_UNSPECIFIED),
    ],
)
def test_what_contradicts_the_request_is_no_result(broken: request_pb2.Output) -> None:
    transcript = ValuesTranscript(2)
    assert transcript.take(broken).verdict is Verdict.CORRUPT
    assert not transcript.finished
