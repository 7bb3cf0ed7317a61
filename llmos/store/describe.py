"""Manifests from folders: reads config, tokenizer files and safetensors headers, never a weight."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from llmos.errors import SourceError
from llmos.store import adapter
from llmos.store.encoders import EncoderFacts, read_encoder, read_object
from llmos.store.manifest import AdapterOf, Manifest, ManifestFile, seal
from llmos.store.tensors import Tensor, main_dtype, read_header

DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
DEFAULT_CONTEXT = 2048
"""For the few models whose config does not bound their positions."""
LARGEST_NUMBER = 2**31 - 1
"""Of any dimension of a model; products of a few of them still fit what travels."""

Json = Mapping[str, Any]


def describe(
    folder: Path, files: Sequence[ManifestFile], *, source: str, license_id: str, created_unix_s: int
) -> Manifest:
    """The sealed manifest of the model that lies in `folder` as `files`. Raises `SourceError` if it is not one."""
    config = read_object(folder, "config.json")
    if config is None:
        raise SourceError("The source has no config.json.")
    tokenizer_hash = next((file.sha256 for file in files if file.path == "tokenizer.json"), None)
    if tokenizer_hash is None:
        raise SourceError("The source has no tokenizer.json; slow tokenizers are not supported.")
    weights = [file.path for file in files if file.path.endswith(".safetensors")]
    tensors = [tensor for path in weights for tensor in read_header(folder / path)]
    if not tensors:
        raise SourceError("The source has no weights in safetensors files.")
    template = chat_template(folder)
    return seal(
        Manifest(
            **_demand(config, tensors, read_encoder(folder)),
            tokenizer_hash=tokenizer_hash,
            chat_template=template,
            chat_template_hash=hashlib.sha256(template.encode()).hexdigest() if template else "",
            bos_token=_special_token(folder, "bos_token"),
            eos_token=_special_token(folder, "eos_token"),
            eos_token_ids=_eos_token_ids(folder, config),
            files=tuple(files),
            license=license_id,
            source=source,
            created_unix_s=created_unix_s,
        )
    )


def describe_adapter(
    folder: Path, files: Sequence[ManifestFile], base: Manifest, base_folder: Path, *, source: str, created_unix_s: int
) -> Manifest:
    """The sealed manifest of the adapter that lies in `folder`. Raises `SourceError` if it does not fit its base."""
    tensors = read_header(folder / adapter.WEIGHTS)
    weights = (file.path for file in base.files if file.path.endswith(".safetensors"))
    linears = [tensor for path in weights for tensor in read_header(base_folder / path)]
    shape = adapter.check(tensors, linears, adapter.read_config(folder))
    return seal(
        msgspec.structs.replace(
            base,
            dtype=main_dtype(tensors),
            parameter_count=sum(tensor.elements for tensor in tensors),
            weight_bytes=sum(tensor.bytes for tensor in tensors),
            kv_bytes_per_token=0,
            files=tuple(files),
            adapter=AdapterOf(base_version=base.version, rank=shape.rank, targets=shape.targets),
            license="",
            source=source,
            created_unix_s=created_unix_s,
        )
    )


def chat_template(folder: Path) -> str:
    """The model's chat template: chat_template.jinja, chat_template.json or tokenizer_config.json, in this order."""
    if (path := folder / "chat_template.jinja").is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SourceError("chat_template.jinja of the source is not text in UTF-8.") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = (read_object(folder, name) or {}).get("chat_template")
        if isinstance(found, list):  # several named ones: [{"name": ..., "template": ...}]
            named = (entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default")
            found = next(named, {}).get("template")
        if isinstance(found, str):
            return found
    return ""


def _demand(config: Json, tensors: Sequence[Tensor], encoder: EncoderFacts | None) -> dict[str, Any]:
    """What must be known to place the model; sizes are upper bounds for models that use less in some layers."""
    text = {**config, **_text_config(config)}
    hidden = _number(text, "hidden_size", "n_embd", "d_model", "dim")
    heads = _number(text, "num_attention_heads", "n_head", "n_heads")
    layers = _number(text, "num_hidden_layers", "n_layer", "n_layers")
    kv_heads = _number(text, "num_key_value_heads", default=heads)
    head_dim = _number(text, "head_dim", default=hidden // heads)
    dtype = main_dtype(tensors)
    demand = {
        "architecture": _architecture(config),
        "model_type": str(config.get("model_type", "")),
        "layers": layers,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": hidden,
        "vocab_size": _number(text, "vocab_size"),
        "context_length": _number(text, "max_position_embeddings", "n_positions", default=DEFAULT_CONTEXT),
        "dtype": dtype,
        "parameter_count": sum(tensor.elements for tensor in tensors),
        "weight_bytes": sum(tensor.bytes for tensor in tensors),
        "kv_bytes_per_token": 2 * layers * kv_heads * head_dim * DTYPE_BYTES.get(dtype, 2),
    }
    if encoder is None:
        return demand
    return demand | {
        "context_length": encoder.context_length,
        "kv_bytes_per_token": 0,  # a text is computed at once and leaves nothing behind
        "capabilities": encoder.capabilities,
        "labels": encoder.labels,
        "dimensions": encoder.dimensions,
    }


def _text_config(config: Json) -> Json:
    """The decoder's part of the config of a model that has others, too."""
    found = config.get("text_config") or {}
    if not isinstance(found, dict):
        raise SourceError("config.json has a 'text_config' that is no object.")
    return found


def _architecture(config: Json) -> str:
    names = config.get("architectures") or [""]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise SourceError("config.json has 'architectures' that are no list of names.")
    return names[0]


def _number(config: Json, *keys: str, default: int | None = None) -> int:
    """The first of the keys that holds a positive integer; the largest of a list of them (one per layer)."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
            value = max(value)
        if isinstance(value, int) and 0 < value <= LARGEST_NUMBER:
            return value
    if default is None:
        raise SourceError(f"config.json has no positive '{keys[0]}': not a decoder that llmos knows.")
    return default


def _special_token(folder: Path, key: str) -> str:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        value = (read_object(folder, name) or {}).get(key)
        if isinstance(value, dict):  # an AddedToken
            value = value.get("content")
        if isinstance(value, str):
            return value
    return ""


def _eos_token_ids(folder: Path, config: Json) -> tuple[int, ...]:
    """As transformers' `generate` takes them: generation_config.json wins over config.json."""
    for holder in (read_object(folder, "generation_config.json") or {}, config, _text_config(config)):
        value = holder.get("eos_token_id")
        if isinstance(value, int):
            return (value,)
        if isinstance(value, list) and value:
            if not all(isinstance(item, int) for item in value):
                raise SourceError("The source has an 'eos_token_id' that is no token id.")
            return tuple(value)
    return ()
