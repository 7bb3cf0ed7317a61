"""A plan of precisions on transformers' own modules: which matrix a module is, and the module that computes it so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmos.store.precision import HEAD, Kind, PrecisionPlan
from worker.engine.grouped import GroupedLinear, restored

_NAMES = {
    "qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "query", "key", "value"),
    "out": ("o_proj", "out_proj"),
    "gate_up": ("gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h"),
    "down": ("down_proj", "fc2", "fc_out", "dense_4h_to_h"),
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names}
HALF_MOST = 65504.0
"""Where fp16 ends."""
_PROJECTIONS = ("c_proj", "dense")
"""Names that stand at the end of attention and of the MLP alike."""


def matrix_of(module: str) -> str | None:
    """The plan's name of the matrix that a module such as `model.layers.0.self_attn.q_proj` holds, or a part of."""
    *parents, last = module.split(".")
    layer = next((int(part) for part in parents if part.isdigit()), None)
    role = _ROLES.get(last)
    if last in _PROJECTIONS and parents:
        role = "out" if "att" in parents[-1] else "down"
    return None if layer is None or role is None else f"layers.{layer}.{role}"


def matrices(model: Any) -> Iterator[tuple[str, str, Any]]:
    """Every linear module of a model that a plan names: the matrix, the module's name and the module."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            matrix = HEAD if module is head else matrix_of(name)
            if matrix is not None:
                yield matrix, name, module


def apply_plan(model: Any, plan: PrecisionPlan) -> None:
    """Change a model in place so that each matrix is computed as the plan says; what the plan does not name stays.

    fp16 rounds the weights and computes in fp32.
    """
    kinds = dict(plan.matrices())
    replacements = [
        (name, GroupedLinear(*_weights(module)))
        for matrix, name, module in matrices(model)
        if kinds.get(matrix) == "int8"
    ]
    round_weights(model, plan)
    for name, replacement in replacements:
        model.set_submodule(name, replacement)


def round_weights(model: Any, plan: PrecisionPlan) -> None:
    """Give all weights, in place, the values that they have in the plan; the model goes on computing in fp32."""
    kinds = dict(plan.matrices())
    rounded: dict[nn.Parameter, tuple[Any, Kind]] = {}  # a matrix that two modules share is rounded once
    for matrix, _, module in matrices(model):
        rounded[module.weight] = module, kinds.get(matrix, "fp32")
    embedding = model.get_input_embeddings()
    rounded[embedding.weight] = embedding, plan.head
    with torch.no_grad():
        for weight, (module, kind) in rounded.items():
            weight.data = _rounded(weight, kind, transposed=isinstance(module, Conv1D))


def _weights(module: Any) -> tuple[Tensor, Tensor | None]:
    """[outputs, inputs] and the bias."""
    return (module.weight.t() if isinstance(module, Conv1D) else module.weight), module.bias


def _rounded(weight: Tensor, kind: Kind, *, transposed: bool) -> Tensor:
    if kind == "int8":
        return restored(weight.t()).t().contiguous() if transposed else restored(weight)
    return weight.clamp(-HALF_MOST, HALF_MOST).half().float() if kind == "fp16" else weight
