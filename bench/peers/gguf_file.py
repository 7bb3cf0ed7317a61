"""llama.cpp's files of our own fp32 weights: F16 and Q8_0.

The package of a model ships a quantized GGUF file; the store holds its weights de-quantized once to fp32. So that all
sides compute the same model, the tensors come from the store; the metadata (shape, tokenizer) is the package's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from safetensors import safe_open

KINDS = {"f16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16), "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0)}
_OURS = re.compile(r"GGUF\..*|general\.(architecture|file_type|quantization_version)|split\..*")
"""Metadata that the writer sets itself."""

Floats = NDArray[np.float32]


def write(folder: Path, original: Path, kind: str, out: Path) -> None:
    """Write the model of `folder` (safetensors) as a GGUF file of `kind` to `out`, with the metadata of `original`.

    Raises ValueError if a tensor of the store is not what the original de-quantizes to.
    """
    reader = GGUFReader(original)
    architecture = str(reader.fields["general.architecture"].contents())
    partial = out.with_suffix(".partial")
    writer = GGUFWriter(partial, architecture)
    writer.add_file_type(KINDS[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _copy_metadata(reader, writer)
    weights = _Weights(folder, architecture, reader)
    for tensor in reader.tensors:
        values = weights.read(tensor.name)
        if not np.array_equal(values, dequantize(tensor.data, tensor.tensor_type).reshape(values.shape)):
            raise ValueError(f"{tensor.name} in the store differs from {original.name}'s")
        # As llama.cpp's own converter does: vectors stay in fp32.
        chosen = KINDS[kind][0] if values.ndim > 1 else Kind.F32
        writer.add_tensor(tensor.name, quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(out)


def _copy_metadata(reader: GGUFReader, writer: GGUFWriter) -> None:
    for name, field in reader.fields.items():
        if _OURS.fullmatch(name):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)


class _Weights:
    """The store's tensors under llama.cpp's names and in its layout."""

    def __init__(self, folder: Path, architecture: str, reader: GGUFReader) -> None:
        self._files = [safe_open(path, framework="numpy") for path in sorted(folder.glob("*.safetensors"))]
        layers = int(reader.fields[f"{architecture}.block_count"].contents())
        kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        names = gguf.get_tensor_name_map(kind, layers)
        self._places = {
            names.get_name(name, try_suffixes=(".weight", ".bias")): (file, name)
            for file in self._files
            for name in file.keys()  # noqa: SIM118  no dictionary
        }
        heads = int(reader.fields[f"{architecture}.attention.head_count"].contents())
        kv_heads = int(reader.fields[f"{architecture}.attention.head_count_kv"].contents())
        # Llama's rotary pairs are neighbours in llama.cpp, halves in transformers.
        self._halves = {"attn_q": heads, "attn_k": kv_heads} if architecture == "llama" else {}
        # Gemma's norms multiply by one plus their weight; llama.cpp's files hold the sum.
        self._one_more = architecture.startswith("gemma")

    def read(self, name: str) -> Floats:
        """A tensor by llama.cpp's name; fp32. Raises KeyError."""
        file, own = self._places[name]
        values: Any = file.get_tensor(own)
        part = name.split(".")[-2]
        if part in self._halves:
            return neighbours(values, self._halves[part])
        if self._one_more and part.endswith("norm"):
            return np.asarray(values + 1, np.float32)
        return np.asarray(values, np.float32)


def neighbours(values: Floats, heads: int) -> Floats:
    """Rows of each head reordered so that a rotary pair (n, n + half) lies side by side; [heads * dim, inputs]."""
    split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))
