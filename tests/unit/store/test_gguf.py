"""The metadata of GGUF files."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from llmos.errors import SourceError
from llmos.store.gguf import read_metadata
from tests.fakes.models import gguf_header

METADATA = {"general.architecture": "llama", "llama.block_count": 30, "tokens": ["a", "bc"], "last": True}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_values_are_read_and_arrays_left_out(tmp_path: Path, version: int) -> None:
    path = write(tmp_path / "m.gguf", gguf_header(METADATA, version))
    assert read_metadata(path) == {"general.architecture": "llama", "llama.block_count": 30, "last": True}


@pytest.mark.parametrize("data", [b"", b"GGU", b"PK\x03\x04" + b"\0" * 40])
def test_another_format_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(SourceError, match="not a GGUF file"):
        read_metadata(write(tmp_path / "m.gguf", data))


def test_an_unknown_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="version 9"):
        read_metadata(write(tmp_path / "m.gguf", gguf_header({}, version=9)))


def test_a_header_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = gguf_header(METADATA)
    for length in range(4, len(whole)):
        with pytest.raises(SourceError, match=r"m\.gguf"):
            read_metadata(write(tmp_path / "m.gguf", whole[:length]))


@pytest.mark.parametrize(
    "tail",
    [
        struct.pack("<QQ", 0, 2**40),
        struct.pack("<QQ", 0, 1) + struct.pack("<Q", 2**40),
        struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 99),
        struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**60),
        struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**62),
        struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 1),
    ],
    ids=["keys", "long key", "kind", "array of strings", "array of numbers", "not UTF-8"],
)
def test_absurd_claims_are_refused(tmp_path: Path, tail: bytes) -> None:
    with pytest.raises(SourceError, match=r"m\.gguf"):
        read_metadata(write(tmp_path / "m.gguf", b"GGUF" + struct.pack("<I", 3) + tail))


def test_arrays_nested_without_end_are_refused(tmp_path: Path) -> None:
    nested = struct.pack("<IQ", 9, 1) * 5000
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9) + nested
    with pytest.raises(SourceError, match=r"m\.gguf"):
        read_metadata(write(tmp_path / "m.gguf", data))
