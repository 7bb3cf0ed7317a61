"""Which of transformers' models the kernels can run, and why not the others."""

from __future__ import annotations

from typing import Any

from torch import nn

from worker.kernels import abi
from worker.kernels.binding import Activation

FAMILIES = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"}
)
ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
}
_FIXED_ROPE = {"default", "linear", "llama3", "yarn"}
"""Kinds of rotary embedding whose angle depends on the position alone."""


def why_not(model: nn.Module) -> str:
    """Why the kernels cannot run a model; empty if they can. Pure; reads the configuration and the modules' types."""
    name = type(model).__name__
    if name not in FAMILIES:
        return f"{name} is not one of the families {', '.join(sorted(FAMILIES))}"
    config: Any = model.config
    return _shape_reason(config) or _config_reason(config) or _module_reason(model)


def head_dim(config: Any) -> int:
    """Width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def activation(config: Any) -> Activation | None:
    """Activation between gate and up, if the kernels have it."""
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return ACTIVATIONS.get(str(name))


def _shape_reason(config: Any) -> str:
    width = head_dim(config)
    sizes = {
        "hidden size": config.hidden_size,
        "intermediate size": config.intermediate_size,
        "width of all heads": config.num_attention_heads * width,
    }
    for what, size in sizes.items():
        if size % abi.GROUP:
            return f"its {what}, {size}, is not a multiple of {abi.GROUP}"
    if width % abi.HEAD_MULTIPLE:
        return f"its head width, {width}, is not a multiple of {abi.HEAD_MULTIPLE}"
    if config.num_attention_heads % config.num_key_value_heads:
        return "its query heads do not divide among its key heads"
    return ""


def _config_reason(config: Any) -> str:
    if activation(config) is None:
        return f"its activation is none of {', '.join(sorted(ACTIVATIONS))}"
    parameters = config.rope_parameters or {}
    per_layer = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    for rope in per_layer:
        if rope.get("rope_type", "default") not in _FIXED_ROPE:
            return f"its rotary embedding is of kind {rope['rope_type']}"
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            return "it rotates only a part of each head"
    if getattr(config, "use_bidirectional_attention", None):
        return "its attention looks ahead"
    return ""


def _module_reason(model: Any) -> str:
    for number, layer in enumerate(model.model.layers):
        linears = [getattr(layer.self_attn, f"{part}_proj") for part in "qkvo"]
        linears += [getattr(layer.mlp, f"{part}_proj") for part in ("gate", "up", "down")]
        if any(type(linear) is not nn.Linear for linear in linears):
            return f"layer {number} has linear layers of another kind"
        if any(linear.bias is not None for linear in linears[4:]):
            return f"layer {number} has biases in its MLP"
    return "" if type(model.lm_head) is nn.Linear and model.lm_head.bias is None else "its head has a bias"
