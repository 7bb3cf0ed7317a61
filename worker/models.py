"""The models that a worker holds: what they need, and the files that gateways ask for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmos.errors import ConfigError, NotFound
from llmos.internal.v1 import registry_pb2, requests_pb2
from llmos.store import Manifest, Store
from worker.backends import echo
from worker.engine_process import EngineModel

CHUNK_BYTES = 1024 * 1024
_FLOAT32_BYTES, _FLOAT16_BYTES, _SCALE_BYTES = 4, 2, 2
_KERNEL_GROUP, _KERNEL_OUTPUTS, _KERNEL_HEAD_MULTIPLE = 64, 16, 16
KERNEL_FAMILIES = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"}
)
_WORKSPACE_BYTES = 256 * 1024 * 1024
"""Activations, logits and sampling of one step of a small model."""
_ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}
_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)")
_MOST_BYTES = 2**60


@dataclass(frozen=True, slots=True)
class HeldModel:
    """A model version whose files are here."""

    record: registry_pb2.ModelRecord
    engine: EngineModel
    blobs: Mapping[str, Path | bytes] = field(default_factory=dict)
    """Tokenizer and chat template by sha256: a file, or the text itself."""

    @property
    def name(self) -> str:
        """Its name in the fleet."""
        return self.record.model.name


def hold(backend: str, names: Sequence[str], store: Path | None, precision: str = "fp32") -> list[HeldModel]:
    """The models behind `--model`, with what they take in `precision`.

    Raises ModelNotFound for one that the store lacks, ConfigError for a bad name.
    """
    if backend == "echo":
        held = [echo_model(text) for text in names or ("echo",)]
    elif names:
        held = [_stored_model(name, Store(store), precision) for name in names]
    else:
        raise ConfigError(
            "name the models to hold with --model; `llmos models ls` shows those in the store", param="model"
        )
    if len({model.name for model in held}) < len(held):
        raise ConfigError("--model names a model twice", param="model")
    return held


def echo_model(text: str) -> HeldModel:
    """`NAME`, or `NAME=40GiB` with the bytes that its weights are said to take."""
    name, _, size = text.partition("=")
    weights = parse_size(size) if size else 0
    if not name:
        raise ConfigError(f"'{text}' names no model", param="model")
    record = registry_pb2.ModelRecord(
        model=requests_pb2.CatalogueModel(
            name=name,
            version=echo.FINGERPRINT,
            context_length=echo.CONTEXT_LENGTH,
            vocab_size=echo.VOCABULARY,
            capabilities=["chat", "completion"],
        ),
        weight_bytes=weights,
        kv_bytes_per_token=echo.KV_BYTES_PER_TOKEN,
    )
    return HeldModel(record, EngineModel(name=name, version=echo.FINGERPRINT, weight_bytes=weights))


def parse_size(text: str) -> int:
    """Bytes in `40GiB`, `24GB`, `1000`. Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"'{text}' is not a size; write it as 40GiB or 24GB", param="model")
    size = int(float(match[1]) * _UNITS[match[2]])
    if size > _MOST_BYTES:
        raise ConfigError(f"'{text}' is more than any machine has", param="model")
    return size


def _stored_model(name: str, store: Store, precision: str) -> HeldModel:
    manifest = store.resolve(name)
    folder = store.materialize(manifest)
    blobs: dict[str, Path | bytes] = {}
    if manifest.tokenizer_hash:
        blobs[manifest.tokenizer_hash] = store.blob_path(manifest.tokenizer_hash)
    if manifest.chat_template_hash:
        blobs[manifest.chat_template_hash] = manifest.chat_template.encode()
    record = _record(name, manifest, precision)
    engine = EngineModel(
        name=record.model.name,
        version=manifest.version,
        folder=str(folder),
        weight_bytes=record.weight_bytes,
        kv_bytes_per_token=record.kv_bytes_per_token,
        context_length=manifest.context_length,
    )
    return HeldModel(record, engine, blobs)


def _demand(manifest: Manifest, precision: str) -> tuple[int, int]:
    """Bytes of weights, and of KV per token: packed with fp16 KV for int8, else fp32 whatever the files hold."""
    kv_numbers = manifest.kv_bytes_per_token // _ELEMENT_BYTES.get(manifest.dtype, 2)
    if precision == "fp32" or not _fits_kernels(manifest):
        return manifest.parameter_count * _FLOAT32_BYTES, kv_numbers * _FLOAT32_BYTES
    scales = manifest.parameter_count * _SCALE_BYTES // _KERNEL_GROUP
    # Cosines and sines for up to two kinds of layers; norms in fp32; the last, partly filled block of outputs.
    angles = 2 * manifest.context_length * manifest.head_dim * _FLOAT32_BYTES
    norms = (4 * manifest.layers + 1) * (manifest.hidden_size + manifest.head_dim) * _FLOAT32_BYTES
    padding = 2 * _KERNEL_OUTPUTS * manifest.hidden_size
    return manifest.parameter_count + scales + angles + norms + padding, kv_numbers * _FLOAT16_BYTES


def _fits_kernels(manifest: Manifest) -> bool:
    """What a manifest can tell of `worker.engine.fast.support.why_not`, which needs the model."""
    fits = manifest.hidden_size % _KERNEL_GROUP == 0 and manifest.head_dim % _KERNEL_HEAD_MULTIPLE == 0
    return manifest.architecture in KERNEL_FAMILIES and fits


def _record(name: str, manifest: Manifest, precision: str) -> registry_pb2.ModelRecord:
    weight_bytes, kv_bytes_per_token = _demand(manifest, precision)
    chat = ["chat"] if manifest.chat_template else []
    return registry_pb2.ModelRecord(
        model=requests_pb2.CatalogueModel(
            name=manifest.name or name,
            version=manifest.version,
            tokenizer_hash=manifest.tokenizer_hash,
            chat_template_hash=manifest.chat_template_hash,
            context_length=manifest.context_length,
            vocab_size=manifest.vocab_size,
            bos_token=manifest.bos_token,
            eos_token=manifest.eos_token,
            capabilities=manifest.capabilities or [*chat, "completion"],
            labels=manifest.labels,
            dimensions=manifest.dimensions,
            created_unix_s=manifest.created_unix_s,
        ),
        weight_bytes=weight_bytes,
        kv_bytes_per_token=kv_bytes_per_token,
        workspace_bytes=_WORKSPACE_BYTES,
    )


def find_blob(models: Iterable[HeldModel], sha256: str) -> Path | bytes:
    """The file or text with that hash. Raises NotFound."""
    for model in models:
        if sha256 in model.blobs:
            return model.blobs[sha256]
    raise NotFound("This worker holds no such file.")


def chunks(blob: Path | bytes) -> Iterator[bytes]:
    """The blob in pieces of at most 1 MiB; reads files as it goes."""
    if isinstance(blob, bytes):
        yield from (blob[start : start + CHUNK_BYTES] for start in range(0, len(blob), CHUNK_BYTES))
        return
    with blob.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece
