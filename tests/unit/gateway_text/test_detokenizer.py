"""Deltas, concatenated, are the whole text: whatever the tokens, however they are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.text.tokenizer import ByteTokenizer, HfTokenizer, Tokenizer
from llmos.errors import InvalidRequest, UnsupportedFeature
from tests.unit.gateway_text import vocabularies

BYTE_LEVEL = vocabularies.byte_level()
SENTENCEPIECE = vocabularies.sentencepiece()
METASPACE = vocabularies.metaspace()
TOKENIZERS = {definition: HfTokenizer(definition) for definition in (BYTE_LEVEL, SENTENCEPIECE, METASPACE)}
LIBRARY = {definition: vocabularies.reference(definition) for definition in TOKENIZERS}


def stream(tokenizer: Tokenizer, token_ids: list[int], *, continuation: bool = False) -> str:
    detokenizer = tokenizer.detokenizer(continuation=continuation)
    return "".join([*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()])


@given(st.lists(st.integers(0, vocabularies.size(BYTE_LEVEL) + 2), max_size=40))
def test_byte_level_tokens_read_as_the_library_reads_them(token_ids: list[int]) -> None:
    expected = LIBRARY[BYTE_LEVEL].decode(token_ids, skip_special_tokens=True)
    assert stream(TOKENIZERS[BYTE_LEVEL], token_ids) == expected


@given(st.text(max_size=30))
def test_byte_level_text_comes_back(text: str) -> None:
    tokenizer = TOKENIZERS[BYTE_LEVEL]
    if vocabularies.END not in text:
        assert stream(tokenizer, tokenizer.encode(text, special=False)) == text


@given(st.binary(max_size=40))
def test_any_bytes_read_as_python_reads_them(data: bytes) -> None:
    assert stream(ByteTokenizer(), list(data)) == data.decode(errors="replace")


@given(st.text(alphabet="ab é世😀", max_size=20))
def test_sentencepiece_text_reads_as_the_library_reads_it(text: str) -> None:
    inner = LIBRARY[SENTENCEPIECE]
    known = inner.get_vocab()
    pieces = [
        [known[character.replace(" ", "▁")]]
        if character in "ab "
        else [known[f"<0x{byte:02X}>"] for byte in character.encode()]
        for character in text
    ]
    token_ids = [token_id for piece in pieces for token_id in piece]
    assert stream(TOKENIZERS[SENTENCEPIECE], token_ids) == inner.decode(token_ids)


@given(st.lists(st.integers(0, vocabularies.size(METASPACE) - 1), max_size=20))
def test_a_decoder_with_context_reads_as_the_library_reads_it(token_ids: list[int]) -> None:
    expected = LIBRARY[METASPACE].decode(token_ids, skip_special_tokens=True)
    assert stream(TOKENIZERS[METASPACE], token_ids) == expected


def test_a_completion_keeps_the_space_that_an_answer_loses() -> None:
    tokenizer = TOKENIZERS[SENTENCEPIECE]
    hello = LIBRARY[SENTENCEPIECE].token_to_id("▁Hello")
    assert stream(tokenizer, [hello]) == "Hello"
    assert stream(tokenizer, [hello], continuation=True) == " Hello"


def test_an_incomplete_character_is_held_back_until_its_last_byte() -> None:
    detokenizer = ByteTokenizer().detokenizer(continuation=False)
    assert [detokenizer.push(byte) for byte in "é!".encode()] == ["", "é", "!"]


def test_special_tokens_have_no_text_but_are_spelt_out_for_logprobs() -> None:
    tokenizer = TOKENIZERS[BYTE_LEVEL]
    end = LIBRARY[BYTE_LEVEL].token_to_id(vocabularies.END)
    assert stream(tokenizer, [end]) == ""
    assert tokenizer.token_bytes(end) == vocabularies.END.encode()


def test_a_special_token_in_the_text_becomes_its_id() -> None:
    end = LIBRARY[BYTE_LEVEL].token_to_id(vocabularies.END)
    assert TOKENIZERS[BYTE_LEVEL].encode(vocabularies.END, special=False) == [end]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), TOKENIZERS[BYTE_LEVEL]])
def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest):
        tokenizer.encode("\ud800", special=False)


@pytest.mark.parametrize("definition", [b"", b"{}", b"\xff\xfe", b'{"model": 1}'])
def test_a_file_that_is_no_tokenizer_is_refused(definition: bytes) -> None:
    with pytest.raises(UnsupportedFeature):
        HfTokenizer(definition)


def test_a_vocabulary_without_decoder_is_still_read() -> None:
    definition = vocabularies.without_decoder(METASPACE)
    assert stream(HfTokenizer(definition), [6, 7]) == vocabularies.reference(definition).decode([6, 7])
