"""The metadata of a GGUF file, without the library: enough to tell what it is before anything is converted.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from llmos.errors import SourceError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEYS = 65_536
MAX_STRING_BYTES = 16 << 20
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9

Value = int | float | bool | str


def read_metadata(path: Path) -> dict[str, Value]:
    """Numbers, flags and strings of the file's header; arrays are left out. Raises `SourceError` if it is not GGUF."""
    try:
        with path.open("rb") as file:
            return _header(file, path.name)
    except (struct.error, UnicodeDecodeError, EOFError) as error:
        raise SourceError(f"{path.name} is cut off or damaged inside its GGUF header.") from error


def _header(file: BinaryIO, name: str) -> dict[str, Value]:
    if file.read(4) != MAGIC:
        raise SourceError(f"{name} is not a GGUF file.")
    version = _number(file, "<I")
    if version not in VERSIONS:
        raise SourceError(f"{name} has GGUF version {version}; versions 2 and 3 can be read.")
    _number(file, "<Q")  # number of tensors
    keys = _number(file, "<Q")
    if keys > MAX_KEYS:
        raise SourceError(f"{name} claims {keys} metadata keys; it is damaged.")
    found: dict[str, Value] = {}
    for _ in range(int(keys)):
        key = _string(file)
        value = _value(file, int(_number(file, "<I")))
        if value is not None:
            found[key] = value
    return found


def _value(file: BinaryIO, kind: int) -> Value | None:
    if kind in SCALARS:
        return _number(file, SCALARS[kind])
    if kind == STRING:
        return _string(file)
    if kind != ARRAY:
        raise EOFError(f"unknown value type {kind}")
    kind, length = int(_number(file, "<I")), int(_number(file, "<Q"))
    if kind in SCALARS:
        file.seek(length * struct.calcsize(SCALARS[kind]), 1)
        return None
    for _ in range(length):
        _value(file, kind)
    return None


def _number(file: BinaryIO, layout: str) -> int | float | bool:
    value: int | float | bool = struct.unpack(layout, file.read(struct.calcsize(layout)))[0]
    return value


def _string(file: BinaryIO) -> str:
    length = int(_number(file, "<Q"))
    if length > MAX_STRING_BYTES:
        raise EOFError("string too long")
    data = file.read(length)
    if len(data) < length:
        raise EOFError("string cut off")
    return data.decode()
