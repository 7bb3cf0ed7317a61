"""What a stored model takes in memory, before anything is loaded: from its manifest and the shapes in its files.

Without torch. How near it comes is measured by `bench/ledger.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmos.store import Manifest
from llmos.store.planning import GROUP
from llmos.store.precision import HEAD, Kind, Precision, PrecisionPlan
from llmos.store.tensors import Tensor, read_header

_STEP_BYTES = 16 << 20
"""Activations of a step, and what the libraries take when they first compute."""
_CUDA_BYTES = 1 << 30
"""Of a device, for the driver's and the libraries' own use, and the activations of recorded passes."""
_CUDA_LOGIT_BYTES = 64
"""Of one logit, with what sampling lays out beside it in float64 and int64."""
LOGIT_ROWS = 64
"""Rows of a step whose logits are wanted, guessed ones included, that memory is set aside for."""
_FLOAT32_BYTES, _FLOAT16_BYTES = 4, 2
_BYTES_OF: dict[Kind, float] = {"int8": 1 + 2 / GROUP, "fp16": 2, "fp32": 4}
"""Of one weight with its part of a scale."""
_ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}
_OUTPUTS = 16
"""Of a packed block; the last one of a matrix may be partly empty."""
_EMBEDDING = "embed_tokens"
_ROLE_OF = {"o_proj": "out", "down_proj": "down", "gate_proj": "gate_up", "up_proj": "gate_up"}
_ROLE_OF |= dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv")


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of weights, of workspace, and of keys and values per token."""

    weights: int
    workspace: int
    kv_per_token: int


def workspace_bytes(vocabulary: int, *, cuda: bool = False) -> int:
    """What a step takes besides weights and KV blocks. `vocabulary` is the width of its logits; 0: it has none."""
    if cuda:
        return _CUDA_BYTES + LOGIT_ROWS * vocabulary * _CUDA_LOGIT_BYTES
    return _STEP_BYTES + LOGIT_ROWS * vocabulary * _FLOAT32_BYTES


def tensors_of(folder: Path) -> list[Tensor]:
    """Of all safetensors files of a model. Raises SourceError for a broken one."""
    return [tensor for path in sorted(folder.glob("*.safetensors")) for tensor in read_header(path)]


def in_fp32(manifest: Manifest, tensors: Sequence[Tensor]) -> Need:
    """On the general path, whatever the files hold."""
    elements = sum(tensor.elements for tensor in tensors)
    if _ties(manifest, tensors):
        # The embedding stays as it is; as the output layer it is packed once more.
        elements += manifest.vocab_size * manifest.hidden_size
    vocabulary = 0 if manifest.capabilities else manifest.vocab_size
    kv_bytes = _kv_numbers(manifest) * _FLOAT32_BYTES
    return Need(elements * _FLOAT32_BYTES, workspace_bytes(vocabulary), kv_bytes)


def on_cuda(manifest: Manifest, tensors: Sequence[Tensor], precision: Precision) -> Need:
    """On a graphics processor: encoders in fp32, the rest in half precision unless fp32 is asked for."""
    vocabulary = 0 if manifest.capabilities else manifest.vocab_size
    size = _FLOAT32_BYTES if precision == "fp32" or manifest.capabilities else _FLOAT16_BYTES
    elements = sum(tensor.elements for tensor in tensors)
    return Need(elements * size, workspace_bytes(vocabulary, cuda=True), _kv_numbers(manifest) * size)


def by_kernels(manifest: Manifest, tensors: Sequence[Tensor], plan: PrecisionPlan) -> Need:
    """By the kernels, each matrix packed as the plan says."""
    kinds = dict(plan.matrices())
    matrices: dict[str, tuple[int, int]] = {}
    floats = 0
    for tensor in tensors:
        name = _matrix_of(tensor)
        if name is None:
            floats += tensor.elements
        else:
            outputs, inputs = tensor.shape
            matrices[name] = matrices.get(name, (0, 0))[0] + outputs, inputs
    # Cosines and sines of one kind of layers, or two; each is half a head wide.
    kinds_of_layers = 2 if manifest.architecture.startswith("Gemma") else 1
    floats += kinds_of_layers * manifest.context_length * manifest.head_dim
    packed = sum(
        -(-outputs // _OUTPUTS) * _OUTPUTS * inputs * _BYTES_OF[kinds[HEAD if name == _EMBEDDING else name]]
        for name, (outputs, inputs) in matrices.items()
    )
    kv_bytes = _kv_numbers(manifest) * _FLOAT16_BYTES
    return Need(int(packed) + floats * _FLOAT32_BYTES, workspace_bytes(manifest.vocab_size), kv_bytes)


def _ties(manifest: Manifest, tensors: Sequence[Tensor]) -> bool:
    """Whether input and output layer of a decoder are one matrix."""
    wide = (manifest.vocab_size, manifest.hidden_size)
    return not manifest.capabilities and sum(tensor.shape == wide for tensor in tensors) == 1


def _matrix_of(tensor: Tensor) -> str | None:
    """The plan's name of the matrix that a tensor is part of; None for norms and biases."""
    parts = tensor.name.split(".")
    if len(tensor.shape) != 2 or parts[-1] != "weight":
        return None
    if parts[-2] == _EMBEDDING:
        return _EMBEDDING
    if parts[-2] == "lm_head":
        return HEAD
    layer = next(_numbers(parts), None)
    role = _ROLE_OF.get(parts[-2])
    return None if layer is None or role is None else f"layers.{layer}.{role}"


def _numbers(parts: Sequence[str]) -> Iterator[int]:
    return (int(part) for part in parts if part.isdigit())


def _kv_numbers(manifest: Manifest) -> int:
    return manifest.kv_bytes_per_token // _ELEMENT_BYTES.get(manifest.dtype, 2)
