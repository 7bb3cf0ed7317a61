"""Bytes to JSON objects."""

from __future__ import annotations

import pytest

from gateway.http.body import parse
from llmos.errors import InvalidRequest

DEPTH = 64


def nested(levels: int) -> bytes:
    """An object that is `levels` deep."""
    return b'{"a":' * levels + b"1" + b"}" * levels


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b"{}", {}),
        (b' {"a": [1, 2.5, null, true, "\\u00e9"]} ', {"a": [1, 2.5, None, True, "é"]}),
        (b'{"a": "' + b"[{" * 500 + b'"}', {"a": "[{" * 500}),
        (b'{"a": "\\"' + b"[" * 500 + b'\\\\"}', {"a": '"' + "[" * 500 + "\\"}),
        (b'{"a": [' + b"[]," * 200 + b"[]]}", {"a": [[]] * 201}),
    ],
)
def test_objects_are_read(raw: bytes, value: object) -> None:
    assert parse(raw, DEPTH) == value


def test_depth_is_bounded_exactly() -> None:
    assert parse(nested(DEPTH), DEPTH)
    with pytest.raises(InvalidRequest, match="nested more than 64"):
        parse(nested(DEPTH + 1), DEPTH)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{",
        b'{"a":1}}',
        b"{'a': 1}",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": 01}',
        b'{"a": "\xff"}',
        b'{"a": "\xed\xa0\x80"}',
        b'{"a": "\\ud800"}',
        b'{"a": "\\ud800x"}',
        b'\xef\xbb\xbf{"a": 1}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 1_000_000,
        b"[" * 1_000_000 + b"]" * 1_000_000,
        b'{"a":' * 100_000,
        b'"' + b"[" * 1_000_000,
        b"[}" * 1_000,
        b'{"a": "' + b"\\" * 1_000_001,
        "{}".encode("utf-16"),
    ],
    ids=range(25),
)
def test_anything_else_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(raw, DEPTH)


def test_big_integers_are_left_to_the_validator() -> None:
    assert parse(b'{"a": ' + b"9" * 30 + b"}", DEPTH) == {"a": int("9" * 30)}
