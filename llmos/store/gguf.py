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
MAX_DEPTH = 4
"""Of arrays in arrays; known files nest none."""

Value = int | float | bool | str


def read_metadata(path: Path) -> dict[str, Value]:
    """Numbers, flags and strings of the file's header; arrays are left out. Raises `SourceError` if it is not GGUF."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise SourceError(f"{path.name} is not a GGUF file.")
        reader = _Reader(file, path.stat().st_size)
        try:
            return _header(reader, path.name)
        except (struct.error, UnicodeDecodeError, EOFError) as error:
            raise SourceError(f"{path.name} is cut off or damaged inside its GGUF header.") from error


def _header(reader: _Reader, name: str) -> dict[str, Value]:
    version = reader.number("<I")
    if version not in VERSIONS:
        raise SourceError(f"{name} has GGUF version {version}; versions 2 and 3 can be read.")
    reader.skip(8)  # number of tensors
    keys = int(reader.number("<Q"))
    if keys > MAX_KEYS:
        raise SourceError(f"{name} claims {keys} metadata keys; it is damaged.")
    found: dict[str, Value] = {}
    for _ in range(keys):
        key = reader.string()
        value = reader.value(int(reader.number("<I")))
        if value is not None:
            found[key] = value
    return found


class _Reader:
    """Values one after the other. Raises EOFError, struct.error or UnicodeDecodeError if they are not there."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size

    def value(self, kind: int, depth: int = 0) -> Value | None:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY or depth > MAX_DEPTH:
            raise EOFError(f"value type {kind}")
        kind, length = int(self.number("<I")), int(self.number("<Q"))
        if kind in SCALARS:
            self.skip(length * struct.calcsize(SCALARS[kind]))
            return None
        for _ in range(length):
            self.value(kind, depth + 1)
        return None

    def number(self, layout: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(layout, self._file.read(struct.calcsize(layout)))[0]
        return value

    def string(self) -> str:
        length = int(self.number("<Q"))
        if length > MAX_STRING_BYTES:
            raise EOFError("string too long")
        data = self._file.read(length)
        if len(data) < length:
            raise EOFError("string cut off")
        return data.decode()

    def skip(self, count: int) -> None:
        if self._file.tell() + count > self._size:
            raise EOFError("array cut off")
        self._file.seek(count, 1)
