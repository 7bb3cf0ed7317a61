"""What an encoder's folder says: how its vectors are made, or what its labels are. Reads configuration only.

Vectors follow sentence-transformers: `modules.json` names the layers after the encoder, `pooling.json` (that library's
`1_Pooling/config.json`) says how rows become one vector, `sentence_bert_config.json` how long a text may be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from llmos.errors import SourceError

Pooling = Literal["mean", "cls", "max", "mean_sqrt_len"]
Json = Mapping[str, Any]

ENCODERS = frozenset({"bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta"})
"""Values of config.json's `model_type` whose models see a text in both directions."""
CLASSIFIER = "ForSequenceClassification"
POOLING_FILE = "pooling.json"
_POSITIONS_AFTER_PADDING = frozenset({"camembert", "roberta", "xlm-roberta"})
"""Their positions are counted from the padding token's id plus one."""
_DEFAULT_LABELS = 2
_POOLINGS: Mapping[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
}


@dataclass(frozen=True, slots=True)
class EncoderFacts:
    """What an encoder is for."""

    capabilities: tuple[str, ...]
    """`embed`, `classify`, or `score`: a classifier with one label."""
    context_length: int
    """Most tokens of a text, special ones included."""
    pooling: Pooling = "mean"
    normalize: bool = False
    """Vectors have length 1."""
    labels: tuple[str, ...] = ()
    independent_labels: bool = False
    """A text may have several labels: each has a probability of its own."""
    dimensions: tuple[int, ...] = ()
    """Lengths of vectors that may be asked for, the model's own first."""


def read_encoder(folder: Path) -> EncoderFacts | None:
    """The facts of the model in `folder`; None if it is no encoder. Raises SourceError if it is one of a strange kind.

    `folder` holds config.json and, where the source has them, the files named above.
    """
    config = read_object(folder, "config.json") or {}
    names = config.get("architectures") or [""]
    architecture = str(names[0]) if isinstance(names, list) else ""
    if config.get("model_type") not in ENCODERS:
        if architecture.endswith(CLASSIFIER):
            raise SourceError(f"{architecture} is not served: classifiers are of {', '.join(sorted(ENCODERS))}.")
        return None
    if architecture.endswith(CLASSIFIER):
        return _classifier(config)
    return _embedder(folder, config)


def _classifier(config: Json) -> EncoderFacts:
    named = config.get("id2label")
    labels = tuple(str(named[key]) for key in sorted(named, key=int)) if isinstance(named, dict) else ()
    labels = labels or tuple(f"LABEL_{number}" for number in range(_DEFAULT_LABELS))
    return EncoderFacts(
        capabilities=("score",) if len(labels) == 1 else ("classify",),
        context_length=_positions(config),
        labels=labels,
        independent_labels=config.get("problem_type") == "multi_label_classification",
    )


def _embedder(folder: Path, config: Json) -> EncoderFacts:
    layers = _layers(folder)
    limit = (read_object(folder, "sentence_bert_config.json") or {}).get("max_seq_length")
    own = _positive(config, "hidden_size", "dim")
    shorter = config.get("matryoshka_dimensions")
    return EncoderFacts(
        capabilities=("embed",),
        context_length=min(_positions(config), limit) if isinstance(limit, int) and limit > 2 else _positions(config),
        pooling=_pooling(folder),
        normalize="Normalize" in layers,
        dimensions=(own, *_shorter(shorter, own)),
    )


def _layers(folder: Path) -> set[str]:
    """Kinds of layers that make a vector of a text."""
    path = folder / "modules.json"
    if not path.is_file():
        return {"Transformer", "Pooling"}
    try:
        listed = msgspec.json.decode(path.read_bytes(), type=list[dict[str, Any]])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SourceError(f"modules.json of the source is not a list of layers: {error}.") from error
    kinds = {str(layer.get("type", "")).rpartition(".")[2] for layer in listed}
    if strange := kinds - {"Transformer", "Pooling", "Normalize"}:
        raise SourceError(f"The source's vectors go through a layer of kind {min(strange)[:64]}, which is not served.")
    return kinds


def _pooling(folder: Path) -> Pooling:
    config = read_object(folder, POOLING_FILE)
    if config is None:
        return "mean"
    chosen = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    named = config.get("pooling_mode")
    if isinstance(named, str):
        chosen = [key for key in _POOLINGS if key in (f"pooling_mode_{named}_token", f"pooling_mode_{named}_tokens")]
    if len(chosen) != 1 or chosen[0] not in _POOLINGS:
        raise SourceError("The source pools its vectors in a way that is not served: mean, cls and max are.")
    return _POOLINGS[chosen[0]]


def _positions(config: Json) -> int:
    positions = _positive(config, "max_position_embeddings")
    if config.get("model_type") in _POSITIONS_AFTER_PADDING:
        padding = config.get("pad_token_id", 1)
        positions -= (padding if isinstance(padding, int) else 0) + 1
    if positions < 1:
        raise SourceError("config.json leaves no position for a token.")
    return positions


def _positive(config: Json, *keys: str) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and 0 < value < 2**31:
            return value
    raise SourceError(f"config.json has no positive '{keys[0]}'.")


def _shorter(listed: object, own: int) -> tuple[int, ...]:
    if not isinstance(listed, list):
        return ()
    return tuple(sorted({size for size in listed if isinstance(size, int) and 0 < size < own}, reverse=True))


def read_object(folder: Path, name: str) -> dict[str, Any] | None:
    """A JSON object in a file, or None if there is no such file. Raises `SourceError` if it holds something else."""
    path = folder / name
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SourceError(f"{name} of the source is not a JSON object: {error}.") from error
