"""Key ranges and requests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.etcd import Compare, Delete, Get, Put
from llmos.etcd import messages as pb
from llmos.etcd.kv import decode_key, encode_key, key_range, txn_request


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("/a/", (b"/a/", b"/a0")),
        ("", (b"\0", b"\0")),
        ("a\udcff", (b"a\xff", b"b")),
        ("\udcff\udcff", (b"\xff\xff", b"\0")),
    ],
)
def test_prefix_ends(prefix: str, expected: tuple[bytes, bytes]) -> None:
    assert key_range(prefix, prefix=True) == expected


def test_single_key_has_no_end() -> None:
    assert key_range("/a/", prefix=False) == (b"/a/", b"")


@given(st.binary(min_size=1), st.binary(min_size=1))
def test_range_holds_exactly_what_starts_with_the_prefix(prefix: bytes, key: bytes) -> None:
    start, end = key_range(decode_key(prefix), prefix=True)
    inside = start <= key and (end == b"\0" or key < end)
    assert inside == key.startswith(prefix)


@given(st.binary())
def test_foreign_keys_survive_a_round_trip(key: bytes) -> None:
    assert encode_key(decode_key(key)) == key


def test_txn_request() -> None:
    request = txn_request(
        [Compare("k", "lease", "!=", 7), Compare("k", "value", ">", b"v")],
        [Put("k", b"v", 9), Delete("/p/", prefix=True)],
        [Get("k")],
    )
    first, second = request.compare
    assert (first.target, first.result, first.lease) == (pb.Compare.LEASE, pb.Compare.NOT_EQUAL, 7)
    assert (second.target, second.result, second.value) == (pb.Compare.VALUE, pb.Compare.GREATER, b"v")
    assert request.success[0].request_put.lease == 9
    assert request.success[1].request_delete_range.range_end == b"/p0"
    assert request.failure[0].request_range.key == b"k"
