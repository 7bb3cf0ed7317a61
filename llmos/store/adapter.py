"""LoRA adapters as PEFT writes them: which are accepted, and where in a model each of their tensors belongs.

Accepted is what has one meaning everywhere: y = W x + scale B (A x) on the projections of attention and MLP. Sources:
LoRA (Hu et al., 2021), rank-stabilized scaling (Kalajdzievski, 2023), PEFT's `LoraConfig` for the file format.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from llmos.errors import SourceError
from llmos.store.tensors import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MOST_RANK = 64
_PROJECTION = re.compile(rf"(?:^|\.)layers\.(\d{{1,6}})\.(?:self_attn|mlp)\.({'|'.join(TARGETS)})(?:\.(.+))?")
_PARTS = {"lora_A.weight": True, "lora_B.weight": False}
_OTHER_ARITHMETIC = {
    "use_dora": "DoRA",
    "lora_bias": "biases of its own",
    "modules_to_save": "whole modules (`modules_to_save`)",
    "trainable_token_indices": "embeddings of its own",
    "rank_pattern": "another rank in some layers",
    "alpha_pattern": "another scale in some layers",
    "fan_in_fan_out": "transposed weights",
    "layer_replication": "repeated layers",
    "target_parameters": "parameters outside of linear layers",
    "alora_invocation_tokens": "activation by tokens",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal matrices",
    "arrow_config": "routing",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Initializations that move a part of the base's weights into the adapter, so that it fits no published base."""


class AdapterConfig(NamedTuple):
    """Width of A's output, and what B (A x) is multiplied with."""

    rank: int
    scale: float
    base: str
    """What PEFT calls the base: a repository, a folder, or nothing."""


class Place(NamedTuple):
    """Where a tensor belongs. `down`: A, [rank, inputs]; else B, [outputs, rank]."""

    layer: int
    target: str
    down: bool


class AdapterShape(NamedTuple):
    """What the tensors of an adapter are: its rank and which projections it changes, in the order of `TARGETS`."""

    rank: int
    targets: tuple[str, ...]


def read_config(folder: Path) -> AdapterConfig:
    """`adapter_config.json` of a folder. Raises `SourceError` for an adapter that is more than LoRA, or none."""
    try:
        config: dict[str, Any] = msgspec.json.decode((folder / CONFIG).read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SourceError(f"{CONFIG} of the source is not a JSON object.") from error
    if config.get("peft_type") != "LORA":
        raise SourceError(f"The adapter is of kind {str(config.get('peft_type'))[:40]}; llmos runs LORA only.")
    _refuse_other_arithmetic(config)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MOST_RANK:
        raise SourceError(f"The adapter's rank must lie between 1 and {MOST_RANK}, not be {str(rank)[:40]}.")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise SourceError(f"{CONFIG} has a 'lora_alpha' that is no number.")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return AdapterConfig(rank, scale, str(config.get("base_model_name_or_path") or ""))


def _refuse_other_arithmetic(config: Mapping[str, Any]) -> None:
    if config.get("bias") not in (None, "none"):
        raise SourceError("The adapter has biases; llmos runs adapters without.")
    for key, what in _OTHER_ARITHMETIC.items():
        if config.get(key):
            raise SourceError(f"The adapter has {what}, which llmos does not run.")
    if str(config.get("init_lora_weights", "")).lower().startswith(_CHANGES_BASE):
        raise SourceError("The adapter was made for a base with other weights: convert it with PEFT, then import it.")
    named = config.get("target_modules")
    if isinstance(named, list) and (strange := {str(name).split(".")[-1] for name in named} - set(TARGETS)):
        raise SourceError(f"The adapter changes {sorted(strange)[0][:80]}; llmos knows {', '.join(TARGETS)}.")


def projection(module: str) -> tuple[int, str] | None:
    """Layer and projection that a module of this name is; None if it is none."""
    found = _PROJECTION.search(module)
    return (int(found[1]), found[2]) if found is not None and found[3] is None else None


def place(name: str) -> Place:
    """Where the tensor of that name belongs. Raises `SourceError` if that is no LoRA matrix of a known projection."""
    found = _PROJECTION.search(name)
    if found is None or found[3] not in _PARTS:
        raise SourceError(f"The adapter holds {name[:120]}, which is no LoRA matrix of {', '.join(TARGETS)}.")
    return Place(int(found[1]), found[2], _PARTS[found[3]])


def check(tensors: Iterable[Tensor], base: Iterable[Tensor], config: AdapterConfig) -> AdapterShape:
    """What the adapter's tensors are. Raises `SourceError` unless they are complete pairs that fit the base's."""
    pairs: dict[tuple[int, str], dict[bool, tuple[int, ...]]] = {}
    for tensor in tensors:
        where = place(tensor.name)
        pairs.setdefault((where.layer, where.target), {})[where.down] = tensor.shape
    if not pairs:
        raise SourceError(f"{WEIGHTS} holds no weights.")
    linears = _linears(base)
    for (layer, target), pair in pairs.items():
        name = f"{target} of layer {layer}"
        if (outputs_inputs := linears.get((layer, target))) is None:
            raise SourceError(f"The adapter changes {name}, which its base does not have.")
        outputs, inputs = outputs_inputs
        if pair != {True: (config.rank, inputs), False: (outputs, config.rank)}:
            raise SourceError(f"The adapter's matrices for {name} do not fit its base, or its rank.")
    changed = {target for _, target in pairs}
    return AdapterShape(config.rank, tuple(target for target in TARGETS if target in changed))


def _linears(base: Iterable[Tensor]) -> dict[tuple[int, str], tuple[int, int]]:
    """Outputs and inputs of the base's projections."""
    found: dict[tuple[int, str], tuple[int, int]] = {}
    for tensor in base:
        match = _PROJECTION.search(tensor.name)
        if match is not None and match[3] == "weight" and len(tensor.shape) == 2:
            found[int(match[1]), match[2]] = tensor.shape[0], tensor.shape[1]
    return found
