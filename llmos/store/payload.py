"""Model files on their way into the store, wherever they lie: on disk, in a wheel, or in parts of several wheels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from llmos.errors import SourceError
from llmos.store import adapter, files
from llmos.store.encoders import POOLING_FILE

METADATA = frozenset(
    {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "chat_template.jinja", "chat_template.json", "model.safetensors.index.json",
        "modules.json", "sentence_bert_config.json", POOLING_FILE,
    }
)  # fmt: skip
"""Everything besides weights that a version may hold."""
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt"})
_LAYER = re.compile(r"\d+_\w+")
"""Folder of a layer that follows an encoder, as sentence-transformers names them."""
QUANTIZATION = re.compile(r"[-._](i?q\d+(_\w+)*|f16|f32|bf16|fp16|fp32)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Payload:
    """One file. `name` has no folder; `read` opens it anew at each call and yields its bytes."""

    name: str
    size: int
    read: Callable[[], Iterator[bytes]]
    path: Path | None = None
    """Where it lies, if it is a plain file."""
    sha256: str = ""
    """What its publisher says it hashes to; "" if nothing is said."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """What a source offers: either one GGUF file, or weights and metadata as transformers loads them."""

    payloads: Sequence[Payload]
    name: str
    """Model name if the user gives none."""
    license_id: str = ""

    def expecting(self, digests: Mapping[str, str]) -> Bundle:
        """The same bundle, with the hashes its publisher promises: file name to SHA-256 in hex."""
        promised = [replace(payload, sha256=digests.get(payload.name, "")) for payload in self.payloads]
        return replace(self, payloads=promised)

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter to a model instead of one."""
        return any(payload.name == adapter.CONFIG for payload in self.payloads)

    @property
    def gguf(self) -> Payload | None:
        first = self.payloads[0]
        return first if first.name.lower().endswith(".gguf") else None


def of_file(path: Path, name: str = "") -> Payload:
    """A plain file, by another name if one is given."""
    return Payload(name or path.name, path.stat().st_size, lambda: files.read_chunks(path), path)


def stored_name(path: str) -> str | None:
    """Name under which a source's file of that path is kept: a version has no folders. None: it is no part of one.

    Of the layers that follow an encoder only the pooling's configuration is kept; `modules.json` tells of the others.
    """
    parts = PurePosixPath(path).parts
    if len(parts) > 1 and _LAYER.fullmatch(parts[-2]):
        return POOLING_FILE if parts[-2].endswith("_Pooling") and parts[-1] == "config.json" else None
    return parts[-1]


def wanted(name: str) -> bool:
    """Whether a file of this name can be part of a model."""
    return name in METADATA or name == adapter.CONFIG or name.lower().endswith((".safetensors", ".gguf"))


def bundle(payloads: Iterable[Payload], origin: str, name: str, license_id: str = "") -> Bundle:
    """Choose what to import from `origin`; safetensors win over GGUF. Raises `SourceError` if the choice is unclear."""
    found = sorted(payloads, key=lambda payload: payload.name)
    _refuse_twins(found, origin)
    weights = [payload for payload in found if payload.name.lower().endswith(".safetensors")]
    ggufs = [payload for payload in found if payload.name.lower().endswith(".gguf")]
    if any(payload.name == adapter.WEIGHTS for payload in weights):
        return Bundle(_adapter_files(found, weights, origin), name, license_id)
    if weights:
        return Bundle(weights + [payload for payload in found if payload.name in METADATA], name, license_id)
    if len(ggufs) == 1:
        return Bundle(ggufs, model_name(ggufs[0].name), license_id)
    if ggufs:
        raise SourceError(
            f"{origin} has {len(ggufs)} GGUF files ({', '.join(payload.name for payload in ggufs[:4])}, ...): "
            "fetch the one you want and import that file."
        )
    if pickles := [payload.name for payload in found if Path(payload.name).suffix.lower() in PICKLES]:
        raise refuse_pickle(pickles[0])
    raise SourceError(f"{origin} has neither safetensors nor GGUF files.")


def _adapter_files(found: Sequence[Payload], weights: Sequence[Payload], origin: str) -> list[Payload]:
    """An adapter's own two files: what else training leaves beside them is its base's."""
    own = [payload for payload in found if payload.name in (adapter.CONFIG, adapter.WEIGHTS)]
    if len(own) < 2:
        raise SourceError(f"{origin} has {adapter.WEIGHTS} but no {adapter.CONFIG}.")
    if len(weights) > 1:
        raise SourceError(f"{origin} holds a model and an adapter: import them from folders of their own.")
    return own


def refuse_pickle(name: str) -> SourceError:
    """The error for weights whose loading would run code."""
    return SourceError(f"{name} is a pickle, and loading one runs code from it: llmos reads safetensors and GGUF only.")


def model_name(file_name: str) -> str:
    """A model's name from the name of its file: without suffix and quantization, in lower case."""
    stem = QUANTIZATION.sub("", Path(file_name).stem)
    return re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._") or "model"


def _refuse_twins(payloads: Sequence[Payload], origin: str) -> None:
    names = [payload.name for payload in payloads]
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise SourceError(f"{origin} holds several models: {twins[0]} is there more than once.")
