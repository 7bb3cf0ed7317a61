"""Headers of safetensors files, honest and not."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from llmos.errors import SourceError
from llmos.store.tensors import main_dtype, read_header
from tests.fakes.models import safetensors


def write(path: Path, header: object, data: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def test_tensors_are_listed_with_their_sizes(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors({"a": (2, 3), "scalar": ()}, "BF16"))
    assert [(t.name, t.dtype, t.elements, t.bytes) for t in read_header(path)] == [
        ("a", "BF16", 6, 12),
        ("scalar", "BF16", 1, 2),
    ]


def test_the_type_of_most_bytes_names_the_model(tmp_path: Path) -> None:
    tensors = []
    for number, (shape, dtype) in enumerate([((9, 9), "BF16"), ((2,), "F32")]):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(safetensors({"t": shape}, dtype))
        tensors += read_header(path)
    assert main_dtype(tensors) == "bfloat16"


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100) + b"{}",
    ],
    ids=["empty", "no length", "huge length", "length past the end"],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(SourceError, match="header does not fit"):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe",
        {"a": 5},
        {"a": {**ENTRY, "shape": [-2]}},
        {"a": {**ENTRY, "shape": ["2"]}},
        {"a": {**ENTRY, "data_offsets": [8, 0]}},
        {"a": {**ENTRY, "data_offsets": [0]}},
        {"a": {"dtype": "F32"}},
    ],
)
def test_a_broken_header_is_refused(tmp_path: Path, header: object) -> None:
    with pytest.raises(SourceError, match="broken safetensors header"):
        read_header(write(tmp_path / "w.safetensors", header, b"\0" * 8))


@pytest.mark.parametrize("data", [b"\0" * 7, b"\0" * 9])
def test_a_file_of_the_wrong_length_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(SourceError, match="cut off, or longer"):
        read_header(write(tmp_path / "w.safetensors", {"a": ENTRY}, data))
