"""Tokens to text, a token at a time. What comes out depends on the tokens alone, never on how they were grouped.

An incomplete UTF-8 character is held back until its last byte arrives, or until `flush` replaces it with U+FFFD.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """The state of one choice. Concatenated, everything that `push` and `flush` return is the choice's text."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What is still held back; nothing may be pushed afterwards."""
        ...


class ByteDetokenizer:
    """For vocabularies whose tokens are strings of bytes: byte-level BPE, SentencePiece with byte fallback, echo.

    The text is the UTF-8 decoding of all bytes together, maximal invalid parts replaced (Unicode 15, table 3-8).
    """

    def __init__(self, bytes_of: Callable[[int], bytes], *, strip_space: bool = False) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = strip_space
        """SentencePiece begins a text with a space that is not part of it."""

    def push(self, token_id: int) -> str:
        """See `Detokenizer`."""
        raw = self._bytes_of(token_id)
        if raw.isascii() and not self._strip_space and not self._decoder.buffer:
            return raw.decode("ascii")  # most tokens: the decoder would do the same, a good deal slower
        return self._stripped(self._decoder.decode(raw))

    def flush(self) -> str:
        """See `Detokenizer`."""
        return self._stripped(self._decoder.decode(b"", True))

    def _stripped(self, text: str) -> str:
        if self._strip_space and text:
            self._strip_space = False
            return text.removeprefix(" ")
        return text


class WindowDetokenizer:
    """For any other vocabulary: decodes a sliding window and takes what the newest token added.

    The window reaches back to the last token that produced text, which is all the context that decoders look at.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._settled = 0
        """Leading tokens of the window whose text is delivered."""

    def push(self, token_id: int) -> str:
        """See `Detokenizer`."""
        self._window.append(token_id)
        added = self._added()
        if not added or added.endswith(REPLACEMENT):
            return ""
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        return added

    def flush(self) -> str:
        """See `Detokenizer`."""
        added = self._added()
        self._settled = len(self._window)
        return added

    def _added(self) -> str:
        before = self._decode(self._window[: self._settled]) if self._settled else ""
        return self._decode(self._window)[len(before) :]
