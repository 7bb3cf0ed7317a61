"""What a stored model takes in memory, before anything is loaded. Without torch."""

from __future__ import annotations

from llmos.store import Manifest
from llmos.store.planning import GROUP
from llmos.store.precision import Kind, PlanRecord, PrecisionPlan

WORKSPACE_BYTES = 256 * 1024 * 1024
"""Activations, logits and sampling of one step of a small model."""
_FLOAT32_BYTES, _FLOAT16_BYTES = 4, 2
_BYTES_OF: dict[Kind, float] = {"int8": 1 + 2 / GROUP, "fp16": 2, "fp32": 4}
"""Of one weight with its part of a scale."""
_ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}
_OUTPUTS = 16
"""Of a packed block; the last one may be partly empty."""


def in_fp32(manifest: Manifest) -> tuple[int, int]:
    """Bytes of weights, and of keys and values per token, on the general path, whatever the files hold."""
    return manifest.parameter_count * _FLOAT32_BYTES, _kv_numbers(manifest) * _FLOAT32_BYTES


def by_kernels(manifest: Manifest, plan: PrecisionPlan, record: PlanRecord | None) -> tuple[int, int]:
    """The same for a plan that the kernels run, an upper bound; exact if it is the one that was measured."""
    kv_bytes = _kv_numbers(manifest) * _FLOAT16_BYTES
    if record is not None and record.measured is not None and record.plan == plan and record.measured.weight_bytes:
        return record.measured.weight_bytes, kv_bytes
    widest = max(_BYTES_OF[kind] for _, kind in plan.matrices())
    # Cosines and sines for up to two kinds of layers; norms in fp32.
    angles = 2 * manifest.context_length * manifest.head_dim * _FLOAT32_BYTES
    norms = (4 * manifest.layers + 1) * (manifest.hidden_size + manifest.head_dim) * _FLOAT32_BYTES
    padding = int(2 * _OUTPUTS * manifest.hidden_size * widest)
    return int(manifest.parameter_count * widest) + angles + norms + padding, kv_bytes


def _kv_numbers(manifest: Manifest) -> int:
    return manifest.kv_bytes_per_token // _ELEMENT_BYTES.get(manifest.dtype, 2)
