from __future__ import annotations

import pytest

from llmos.cli.answer import texts
from llmos.errors import Overloaded, Unavailable


def test_pieces_of_a_whole_stream() -> None:
    lines = [
        b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n',
        b"\n",
        b": keep-alive\n",
        b'data: {"choices": [{"delta": {"content": "Par"}}]}\n',
        b'data: {"choices": [{"delta": {"content": "is"}, "finish_reason": "stop"}]}\n',
        b'data: {"choices": [], "usage": {}}\n',
        b"data: [DONE]\n",
    ]
    assert "".join(texts(lines)) == "Paris"


def test_a_stream_without_done_was_cut() -> None:
    with pytest.raises(Unavailable, match="broke off"):
        list(texts([b'data: {"choices": [{"delta": {"content": "Par"}}]}\n']))


def test_an_error_event_is_raised_with_its_type() -> None:
    with pytest.raises(Overloaded, match="later"):
        list(texts([b'data: {"error": {"code": "overloaded", "message": "come back later"}}\n']))
