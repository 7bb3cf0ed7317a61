"""The models that a worker holds: what they need, and the files that gateways ask for."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmos.errors import ConfigError, MissingExtra, NotFound, SourceError, StoreBusy
from llmos.internal.v1 import registry_pb2, requests_pb2
from llmos.store import Manifest, Store
from llmos.store.planning import ensure_plan, plannable
from llmos.store.precision import PlanRecord, Precision, PrecisionPlan, identity
from worker import demand
from worker.backends import echo
from worker.engine_process import EngineModel
from worker.kernels.library import preferred

log = logging.getLogger(__name__)

CHUNK_BYTES = 1024 * 1024
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


def hold(
    backend: str,
    names: Sequence[str],
    store: Path | None,
    precision: Precision = "auto",
    kernels_available: Callable[[], bool] = preferred,
    *,
    on_gpu: bool = False,
) -> list[HeldModel]:
    """The models behind `--model`, with what they take in `precision`. May measure plans and compile the kernels now.

    `on_gpu`: on a graphics processor, where plans are not followed, and not measured either.

    Raises ModelNotFound for one that the store lacks, ConfigError for a bad name.
    """
    if backend == "echo":
        held = [echo_model(text) for text in names or ("echo",)]
    elif names:
        held = [_stored_model(name, Store(store), precision, kernels_available, on_gpu) for name in names]
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


class LoggedProgress:
    """Stages as lines of the log."""

    def stage(self, label: str, total: int | None, *, in_bytes: bool = True) -> None:
        """See `llmos.store.Progress`."""
        del total, in_bytes
        log.info("%s", label)

    def advance(self, amount: int) -> None:
        """See `llmos.store.Progress`."""


def parse_size(text: str) -> int:
    """Bytes in `40GiB`, `24GB`, `1000`. Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"'{text}' is not a size; write it as 40GiB or 24GB", param="model")
    size = int(float(match[1]) * _UNITS[match[2]])
    if size > _MOST_BYTES:
        raise ConfigError(f"'{text}' is more than any machine has", param="model")
    return size


def _stored_model(
    name: str, store: Store, precision: Precision, kernels_available: Callable[[], bool], on_gpu: bool
) -> HeldModel:
    manifest = store.resolve(name)
    planned = store.plan(manifest) if on_gpu else _plan(store, manifest, precision)
    folder = store.materialize(manifest)
    blobs: dict[str, Path | bytes] = {}
    if manifest.tokenizer_hash:
        blobs[manifest.tokenizer_hash] = store.blob_path(manifest.tokenizer_hash)
    if manifest.chat_template_hash:
        blobs[manifest.chat_template_hash] = manifest.chat_template.encode()
    if on_gpu:
        need = demand.on_cuda(manifest, demand.tensors_of(folder), precision)
    else:
        plan = planned.plan if planned is not None else None
        need = demand_of(manifest, folder, plan, precision, kernels_available)
    record = _record(name, manifest, planned, need)
    engine = EngineModel(
        name=record.model.name,
        version=record.model.version,
        folder=str(folder),
        weight_bytes=record.weight_bytes,
        kv_bytes_per_token=record.kv_bytes_per_token,
        context_length=manifest.context_length,
        plan=planned.plan if planned is not None else None,
    )
    return HeldModel(record, engine, blobs)


def _plan(store: Store, manifest: Manifest, precision: Precision) -> PlanRecord | None:
    """The version's plan, which is part of the version whatever it is served in; measured if `auto` needs it."""
    if precision != "auto":
        return store.plan(manifest)
    try:
        return ensure_plan(store, manifest, LoggedProgress())
    except (MissingExtra, SourceError, StoreBusy) as error:
        log.warning("%s is served in fp32: %s", manifest.name, error.message)
        return None


def demand_of(
    manifest: Manifest,
    folder: Path,
    plan: PrecisionPlan | None,
    precision: Precision,
    kernels_available: Callable[[], bool] = preferred,
) -> demand.Need:
    """What a version takes in what the engine will choose. `folder` holds its files, `plan` is the version's own."""
    tensors = demand.tensors_of(folder)
    if precision in ("fp16", "int8"):
        plan = PrecisionPlan.uniform(precision, manifest.layers)
    wanted = precision != "fp32" and plannable(manifest)
    if plan is not None and not plan.exact and wanted and kernels_available():
        return demand.by_kernels(manifest, tensors, plan)
    return demand.in_fp32(manifest, tensors)


def _record(name: str, manifest: Manifest, planned: PlanRecord | None, need: demand.Need) -> registry_pb2.ModelRecord:
    chat = ["chat"] if manifest.chat_template else []
    return registry_pb2.ModelRecord(
        model=requests_pb2.CatalogueModel(
            name=manifest.name or name,
            version=identity(manifest.version, planned.plan if planned is not None else None),
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
        weight_bytes=need.weights,
        kv_bytes_per_token=need.kv_per_token,
        workspace_bytes=need.workspace,
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
