"""What a safetensors file says about its tensors, without the library and without reading a weight.

Format: eight bytes little-endian length, a JSON header of that length, then the data
(https://github.com/huggingface/safetensors, section Format).
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from llmos.errors import SourceError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation."""
TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
}


class Tensor(NamedTuple):
    """One entry of a header. `dtype` as in the file; sizes in elements and bytes."""

    name: str
    dtype: str
    elements: int
    bytes: int
    shape: tuple[int, ...]


def read_header(path: Path) -> list[Tensor]:
    """All tensors of the file. Raises `SourceError` if header and file do not fit together."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise SourceError(f"{path.name} is not a safetensors file: its header does not fit into it.")
        header = file.read(length)
    try:
        entries = msgspec.json.decode(header, type=dict[str, dict[str, Any]])
        tensors = [_tensor(name, entry) for name, entry in entries.items() if name != "__metadata__"]
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
        raise SourceError(f"{path.name} has a broken safetensors header: {error}.") from error
    if sum(tensor.bytes for tensor in tensors) != size - 8 - length:
        raise SourceError(f"{path.name} is cut off, or longer than its header says; fetch it again.")
    return tensors


def main_dtype(tensors: Sequence[Tensor]) -> str:
    """The type of most of the bytes, in torch's words."""
    weight: Counter[str] = Counter()
    for tensor in tensors:
        weight[tensor.dtype] += tensor.bytes
    dtype = weight.most_common(1)[0][0]
    return TORCH_NAMES.get(dtype, dtype.lower())


def _tensor(name: str, entry: dict[str, Any]) -> Tensor:
    start, end = entry["data_offsets"]
    shape = entry["shape"]
    if not 0 <= start <= end or not all(isinstance(side, int) and side >= 0 for side in shape):
        raise ValueError(f"offsets or shape of {name[:80]}")
    return Tensor(name, str(entry["dtype"]), math.prod(shape), end - start, tuple(shape))
