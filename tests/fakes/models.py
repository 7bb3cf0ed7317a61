"""Tiny models and wheels, written without torch and without any library of the formats."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 16,
    "vocab_size": 32,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}


LINEARS = {"q_proj": (16, 16), "v_proj": (8, 16), "down_proj": (16, 24)}
"""Outputs and inputs of some projections of the model."""


def _module(name: str) -> str:
    return f"model.layers.0.{'mlp' if name == 'down_proj' else 'self_attn'}.{name}"


def safetensors(tensors: Mapping[str, Sequence[int]], dtype: str = "F32", fill: bytes = b"\0") -> bytes:
    """A safetensors file: name to shape, every byte of the data `fill`."""
    width = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        size = math.prod(shape) * width
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + fill * offset


def model_files(fill: bytes = b"\0") -> dict[str, bytes]:
    """The files of a model that the store accepts; `fill` tells one model's weights from another's."""
    tokens = {f"t{index}": index for index in range(32)}
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "generation_config.json": json.dumps({"eos_token_id": [2, 3]}).encode(),
        "tokenizer.json": json.dumps({"model": {"type": "WordLevel", "vocab": tokens}}).encode(),
        "tokenizer_config.json": json.dumps({"bos_token": "t1", "eos_token": {"content": "t2"}}).encode(),
        "chat_template.jinja": TEMPLATE.encode(),
        "model.safetensors": safetensors({"embed.weight": (32, 16), "norm.weight": (16,)}, fill=fill),
    }


def write_model(folder: Path, fill: bytes = b"\0", without: Sequence[str] = ()) -> Path:
    """`model_files` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in model_files(fill).items():
        if name not in without:
            (folder / name).write_bytes(data)
    return folder


def write_base(folder: Path) -> Path:
    """A model with the projections that the adapters of `write_peft` change."""
    write_model(folder)
    linears = {f"{_module(name)}.weight": shape for name, shape in LINEARS.items()}
    (folder / "linears.safetensors").write_bytes(safetensors(linears))
    return folder


def write_peft(folder: Path, base: str, **config: Any) -> Path:
    """A LoRA adapter of rank 2 to the model of `write_base`, as PEFT saves it; `config` changes its settings."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": [*LINEARS], **config}))
    tensors: dict[str, Sequence[int]] = {}
    for name, (outputs, inputs) in LINEARS.items():
        tensors[f"base_model.model.{_module(name)}.lora_A.weight"] = (2, inputs)
        tensors[f"base_model.model.{_module(name)}.lora_B.weight"] = (outputs, 2)
    (folder / "adapter_model.safetensors").write_bytes(safetensors(tensors))
    return folder


def write_wheel(
    folder: Path,
    package: str,
    members: Mapping[str, bytes],
    *,
    version: str = "1.0.0",
    requires: Sequence[str] = (),
    metadata: Sequence[str] = (),
) -> Path:
    """A wheel that pip accepts, in `folder`."""
    stem = package.replace("-", "_")
    info = f"{stem}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {package}", f"Version: {version}", *metadata]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    content = {
        **members,
        f"{info}/METADATA": ("\n".join(lines) + "\n").encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: llmos\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in content.items())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    return path


def gguf_header(metadata: Mapping[str, int | str | bool | Sequence[str]], version: int = 3) -> bytes:
    """The header of a GGUF file without tensors."""
    return b"GGUF" + struct.pack("<IQQ", version, 0, len(metadata)) + b"".join(map(_entry, metadata.items()))


def _entry(item: tuple[str, int | str | bool | Sequence[str]]) -> bytes:
    key, value = item
    if isinstance(value, bool):
        return _text(key) + struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return _text(key) + struct.pack("<II", 4, value)
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", 8) + _text(value)
    return _text(key) + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
