"""Text to tokens and back, for one vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import tokenizers

from gateway.text.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from llmos.errors import InvalidRequest, UnsupportedFeature

_FALLBACK_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"


class Tokenizer(Protocol):
    """One vocabulary. Stateless; safe to share between requests and threads."""

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids. `special` adds what the vocabulary puts around a text of its own, such as a begin token."""
        ...

    def encode_task(self, first: str, second: str | None, limit: int | None) -> tuple[list[int], int]:
        """Token ids of one text or a pair, special ones included, and where the second text begins; 0: there is none.

        At most `limit` ids, if one is given: the end of the text, of a pair that of the second, is left out. Raises
        InvalidRequest where that leaves none.
        """
        ...

    def detokenizer(self, *, continuation: bool) -> Detokenizer:
        """Fresh state for one choice. A continuation keeps a leading space, an answer loses SentencePiece's one."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """A token by itself, special ones spelt out; empty if there is none of that id."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte: what echo models speak."""

    def encode(self, text: str, *, special: bool) -> list[int]:
        """See `Tokenizer`."""
        return list(_utf8(text))

    def encode_task(self, first: str, second: str | None, limit: int | None) -> tuple[list[int], int]:
        """See `Tokenizer`."""
        start = list(_utf8(first))
        if second is None:
            return start[:limit], 0
        rest = list(_utf8(second))
        return start + rest[: _room(limit, len(start), len(rest))], len(start)

    def detokenizer(self, *, continuation: bool) -> Detokenizer:
        """See `Tokenizer`."""
        return ByteDetokenizer(self.token_bytes)

    def token_bytes(self, token_id: int) -> bytes:
        """See `Tokenizer`."""
        return bytes((token_id,)) if token_id < 256 else b""


class HfTokenizer:
    """A `tokenizer.json` of the Hugging Face library."""

    def __init__(self, definition: bytes) -> None:
        """`definition` is the file's content. Raises UnsupportedFeature if the library can't read it."""
        try:
            self._inner = tokenizers.Tokenizer.from_str(definition.decode())
            decoder = json.loads(definition).get("decoder") or {}
        except Exception as error:  # the library raises bare Exception for whatever its parser refuses
            raise UnsupportedFeature("The model's tokenizer can't be read by this release.", param="model") from error
        # A prompt is never cut or filled up behind the client's back.
        self._inner.no_truncation()
        self._inner.no_padding()
        self._special = {
            token_id for token_id, token in self._inner.get_added_tokens_decoder().items() if token.special
        }
        self._spell = _speller(decoder)
        self._strip_space = _strips_space(decoder)
        self._table: dict[int, bytes] = {}

    def encode(self, text: str, *, special: bool) -> list[int]:
        """See `Tokenizer`."""
        _utf8(text)
        ids: list[int] = self._inner.encode(text, add_special_tokens=special).ids
        return ids

    def encode_task(self, first: str, second: str | None, limit: int | None) -> tuple[list[int], int]:
        """See `Tokenizer`."""
        inner, pair = self._inner, second is not None
        texts = [first] if second is None else [first, second]
        for text in texts:
            _utf8(text)
        parts = [inner.encode(text, add_special_tokens=False) for text in texts]
        around = inner.num_special_tokens_to_add(pair) + (len(parts[0]) if pair else 0)
        parts[-1].truncate(_room(limit, around, len(parts[-1])))
        whole = inner.post_process(parts[0], parts[1] if pair else None, add_special_tokens=True)
        return list(whole.ids), _second_at(whole) if pair else 0

    def detokenizer(self, *, continuation: bool) -> Detokenizer:
        """See `Tokenizer`. Special tokens have no text."""
        if self._spell is None:
            return WindowDetokenizer(self._decode)
        return ByteDetokenizer(self._visible_bytes, strip_space=self._strip_space and not continuation)

    def token_bytes(self, token_id: int) -> bytes:
        """See `Tokenizer`."""
        known = self._table.get(token_id)
        if known is None:
            known = self._table[token_id] = self._bytes_of(token_id)
        return known

    def _visible_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._special else self.token_bytes(token_id)

    def _bytes_of(self, token_id: int) -> bytes:
        token = self._inner.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._special:
            return str(token).encode()
        if self._spell is None:
            return self._decode([token_id]).encode()
        return self._spell(token)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._inner.decode(list(token_ids), skip_special_tokens=True))


def _room(limit: int | None, taken: int, wanted: int) -> int:
    """Tokens of `wanted` that fit beside those that are taken."""
    if limit is None or taken + wanted <= limit:
        return wanted
    if taken >= limit:
        raise InvalidRequest(f"{limit} tokens leave no room for the text.", param="truncate_prompt_tokens")
    return limit - taken


def _second_at(pair: Any) -> int:
    """Where the second text begins: by the kinds that the vocabulary gives, else by the text that a token is of."""
    kinds, texts = list(pair.type_ids), list(pair.sequence_ids)
    if 1 in kinds:
        return kinds.index(1)
    return texts.index(1) if 1 in texts else len(texts)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest("The text holds half of a surrogate pair, which is no character.") from error


def _steps(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(decoder.get("decoders", ())) if decoder.get("type") == "Sequence" else [decoder]


def _speller(decoder: Mapping[str, Any]) -> Callable[[str], bytes] | None:
    """How a token is spelt in bytes; None if the decoder looks at more than one token."""
    kinds = [step.get("type") for step in _steps(decoder)]
    if kinds == ["ByteLevel"]:
        return _byte_level
    if "ByteFallback" in kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return _sentencepiece
    return None


def _strips_space(decoder: Mapping[str, Any]) -> bool:
    return any(step.get("type") == "Strip" and step.get("start") for step in _steps(decoder))


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:  # an added token, spelt as it is
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    fallback = _FALLBACK_TOKEN.fullmatch(token)
    if fallback:
        return bytes((int(fallback[1], 16),))
    return token.replace(_SPACE_MARK, " ").encode()
