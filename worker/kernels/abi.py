"""The C interface of `abi.h` in ctypes: structures, constants, signatures."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p

ABI = 6
GROUP = 64
"""Inputs of a linear layer that share a scale; their number must be a multiple of it."""
HEAD_MULTIPLE = 16
KEY_TILE = 16
MOST_RANK = 64
"""Of an adapter."""
TARGETS = 7
"""Projections that an adapter may change, in the order of `llmos.store.adapter.TARGETS`."""

MESSAGES = {
    1: "the shape does not fit the kernels",
    2: "a token id lies outside the vocabulary",
    3: "a position lies outside the model's context or the block table",
    4: "a block number lies outside the pool",
    5: "a row number, or the number of rows, lies outside its range",
    6: "a row names an adapter that is not there",
    7: "not enough memory",
}


class Matrix(Structure):
    """`llk_matrix`."""

    _fields_ = (("data", c_void_p), ("outputs", c_int32), ("inputs", c_int32), ("kind", c_int32))


class Layer(Structure):
    """`llk_layer`."""

    _fields_ = (
        *((name, Matrix) for name in ("qkv", "out", "gate_up", "down")),
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "post_attention_norm", "post_mlp_norm")),
        *((name, c_void_p) for name in ("query_norm", "key_norm", "qkv_bias", "out_bias", "cosines", "sines")),
        ("window", c_int32),
    )


class Shape(Structure):
    """`llk_shape`."""

    _fields_ = (
        *((name, c_int32) for name in ("hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim")),
        *((name, c_int32) for name in ("vocabulary", "positions", "max_rows", "activation", "kv_half")),
        *((name, c_float) for name in ("epsilon", "embedding_scale", "attention_scale")),
        *((name, c_float) for name in ("attention_softcap", "logit_softcap")),
        ("embedding", Matrix),
        ("head", Matrix),
        ("final_norm", c_void_p),
        ("layer", POINTER(Layer)),
    )


class AdapterLayer(Structure):
    """`llk_adapter_layer`."""

    _fields_ = (("down", c_void_p * TARGETS), ("up", c_void_p * TARGETS), ("factor", c_float * TARGETS))


class Adapter(Structure):
    """`llk_adapter`."""

    _fields_ = (("layer", POINTER(AdapterLayer)), ("rank", c_int32))


class StepArgs(Structure):
    """`llk_step_args`."""

    _fields_ = (
        *((name, c_int32) for name in ("rows", "sequences", "wanted_rows", "blocks")),
        *((name, c_void_p) for name in ("tokens", "positions", "sequence", "tables", "table_blocks", "wanted")),
        *((name, c_void_p) for name in ("logits", "keys", "values")),
        ("adapter_count", c_int32),
        ("adapters", POINTER(Adapter)),
        ("adapter", c_void_p),
    )


class PickRow(Structure):
    """`llk_pick_row`."""

    _fields_ = (
        *((name, c_void_p) for name in ("logits", "raw")),
        *((name, c_double) for name in ("temperature", "top_p", "log_min_p")),
        ("seed", c_uint64),
        *((name, c_uint32) for name in ("choice", "index")),
        ("top_k", c_int32),
    )


_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "llk_abi": (c_int32, []),
    "llk_best_isa": (c_int32, []),
    "llk_isa_supported": (c_int32, [c_int32]),
    "llk_set_threads": (None, [c_int32]),
    "llk_threads": (c_int32, []),
    "llk_packed_bytes": (c_int64, [c_int32, c_int32, c_int32]),
    "llk_pack": (c_int32, [c_int32, c_void_p, c_int32, c_int32, c_void_p]),
    "llk_unpack": (c_int32, [POINTER(Matrix), c_void_p]),
    "llk_quantize": (c_int32, [c_int32, c_void_p, c_void_p, c_float, c_int32, c_int32, c_void_p, c_void_p]),
    "llk_gemm": (c_int32, [c_int32, POINTER(Matrix), c_void_p, c_void_p, c_int32, c_void_p]),
    "llk_gemm_float": (c_int32, [c_int32, POINTER(Matrix), c_void_p, c_int32, c_void_p]),
    "llk_activate": (c_int32, [c_int32, c_int32, c_void_p, c_int32, c_void_p]),
    "llk_pick": (c_int32, [c_int32, POINTER(PickRow), c_int32, c_int32, POINTER(c_int32)]),
    "llk_open": (c_void_p, [POINTER(Shape), c_int32, POINTER(c_int32)]),
    "llk_close": (None, [c_void_p]),
    "llk_step": (c_int32, [c_void_p, POINTER(StepArgs)]),
    "llk_attend": (c_int32, [c_void_p, c_int32, POINTER(StepArgs), c_void_p, c_void_p]),
}


def declare(library: ctypes.CDLL) -> None:
    """Give every function its types. Raises AttributeError if one is missing."""
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
