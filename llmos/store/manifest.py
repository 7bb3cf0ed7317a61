"""What a model version is: its files by hash, and the numbers that placement needs before anything is loaded."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from llmos.errors import StoreCorrupt
from llmos.store.layout import DIGEST

PROVENANCE = frozenset({"name", "version", "source", "license", "created_unix_s"})
"""Fields that say where a version came from; the same bytes from elsewhere are the same version."""
_LATER = frozenset({"adapter", "capabilities", "labels", "dimensions"})
"""Fields that earlier releases did not have: left out where they say nothing, so that old versions keep their hash."""


class AdapterOf(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What makes a version a LoRA adapter: the version that it was trained on, its rank, the projections it changes."""

    base_version: str
    rank: int
    targets: tuple[str, ...]


class ManifestFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of a version. `path` is a plain file name, `size` is in bytes."""

    path: str
    sha256: str
    size: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model version, as `describe` made it.

    `version` is the SHA-256 of every field outside PROVENANCE; `name` is the pointer through which it was read.
    """

    name: str = ""
    version: str = ""
    architecture: str
    """Class that transformers instantiates, such as LlamaForCausalLM."""
    model_type: str
    layers: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    """Width of the logits; may exceed the number of tokens in the tokenizer."""
    context_length: int
    """Tokens, prompt and output together."""
    dtype: str
    """Of most of the weights, in torch's words: float32, bfloat16, ..."""
    parameter_count: int
    weight_bytes: int
    kv_bytes_per_token: int
    """All layers, keys and values, in `dtype`."""
    tokenizer_hash: str
    """SHA-256 of tokenizer.json."""
    chat_template: str = ""
    """Jinja source; "" if the model has none."""
    chat_template_hash: str = ""
    """SHA-256 of `chat_template`; "" if there is none."""
    bos_token: str = ""
    eos_token: str = ""
    eos_token_ids: tuple[int, ...] = ()
    capabilities: tuple[str, ...] = ()
    """What an encoder does: `embed`, `classify`, `score`; () for a decoder."""
    labels: tuple[str, ...] = ()
    """Of a classifier, in the order of its values."""
    dimensions: tuple[int, ...] = ()
    """Lengths of vectors that an encoder makes, its own first."""
    files: tuple[ManifestFile, ...]
    """Sorted by path."""
    adapter: AdapterOf | None = None
    """Set for an adapter, whose files are its own and whose other fields, but sizes, are its base's."""
    license: str = ""
    source: str = ""
    """As given to `llmos models import`."""
    created_unix_s: int = 0

    def file(self, path: str) -> ManifestFile | None:
        """The entry of that file name, or None."""
        return next((entry for entry in self.files if entry.path == path), None)


def version_of(manifest: Manifest) -> str:
    """SHA-256, in hex, of the manifest's content: what decides bytes, not where it came from."""
    content = {key: value for key, value in _fields(manifest).items() if key not in PROVENANCE}
    return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()


def seal(manifest: Manifest) -> Manifest:
    """The same manifest with files in order and `version` filled in."""
    ordered = msgspec.structs.replace(manifest, files=tuple(sorted(manifest.files, key=lambda entry: entry.path)))
    return msgspec.structs.replace(ordered, version=version_of(ordered))


def encode(manifest: Manifest) -> bytes:
    """JSON for people and programs, without the name: names are pointers and live elsewhere."""
    return msgspec.json.format(msgspec.json.encode(_fields(manifest) | {"name": ""}), indent=2) + b"\n"


def _fields(manifest: Manifest) -> dict[str, Any]:
    return {key: value for key, value in msgspec.to_builtins(manifest).items() if value or key not in _LATER}


def decode(data: bytes, version: str) -> Manifest:
    """Parse and check. Raises `StoreCorrupt` if the content does not hash to `version`, or is made to do harm."""
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StoreCorrupt(f"The manifest of version {version[:12]} cannot be read: {error}.") from error
    if manifest.version != version or version_of(manifest) != version:
        raise StoreCorrupt(f"The manifest of version {version[:12]} does not match its hash; import the model again.")
    if not all(_is_sound(file) for file in manifest.files):
        raise StoreCorrupt(f"The manifest of version {version[:12]} names a file that cannot be in a store.")
    return manifest


def _is_sound(file: ManifestFile) -> bool:
    """Anybody can seal a manifest: a transfer must not write outside of its folder because one says so."""
    plain = file.path not in ("", ".", "..") and not any(char in "/\\\0" for char in file.path)
    return plain and DIGEST.fullmatch(file.sha256) is not None and file.size >= 0
