"""From transformers' module to the kernels' description of a model: packed weights, norms, tables of angles."""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmos.errors import UnsupportedFeature
from llmos.store.precision import HEAD, PrecisionPlan
from worker.engine import attention
from worker.engine.attention import LayerCall
from worker.engine.fast.arena import Arena, aligned
from worker.engine.fast.support import activation, head_dim, why_not
from worker.kernels import Kernels, Kind, abi
from worker.kernels.binding import PackedMatrix, address

KindOf = Callable[[str], Kind]
"""How to store a matrix: `embedding` (if tied, the head too), `head`, or `layers.N.` with qkv, out, gate_up or down."""
_INTERLEAVE = 8
"""Outputs of gate, then as many of up, in a packed block."""


@dataclass(slots=True)
class PackedModel:
    """What a kernel model points to. Must outlive it; owns all of it."""

    shape: abi.Shape
    calls: list[LayerCall]
    weight_bytes: int
    kept: list[object] = field(default_factory=list)


def all_int8(name: str) -> Kind:
    """The kind of every matrix unless told otherwise."""
    return Kind.INT8


def planned(plan: PrecisionPlan) -> KindOf:
    """The kind of every matrix as a plan has it."""
    kinds = {name: Kind[kind.upper()] for name, kind in plan.matrices()}
    kinds["embedding"] = kinds[HEAD]
    return kinds.__getitem__


def pack(
    model: Any, kernels: Kernels, positions: int, max_rows: int, kv_dtype: torch.dtype, kind_of: KindOf = all_int8
) -> PackedModel:
    """Pack a model that `why_not` lets through; the model can be dropped afterwards. Raises UnsupportedFeature."""
    if reason := why_not(model):
        raise UnsupportedFeature(f"The fast path cannot run this model: {reason}.")
    with torch.inference_mode():
        return _Packer(model, kernels, positions, kind_of).pack(max_rows, kv_dtype)


class _Packer:
    def __init__(self, model: Any, kernels: Kernels, positions: int, kind_of: KindOf) -> None:
        self._model, self._inner, self._config = model, model.model, model.config
        self._kernels = kernels
        self._positions = positions
        self._kind_of = kind_of
        self._kept: list[object] = []
        self._tables: dict[str | None, tuple[Tensor, Tensor]] = {}
        shapes = self._matrix_shapes()
        sizes = (kernels.packed_bytes(outputs, inputs, kind_of(name)) for name, (outputs, inputs) in shapes.items())
        self._arena = Arena(sum(map(aligned, sizes)))

    def pack(self, max_rows: int, kv_dtype: torch.dtype) -> PackedModel:
        config, calls = self._config, layer_calls(self._model)
        layers = (abi.Layer * len(calls))(*(self._layer(number, call) for number, call in enumerate(calls)))
        embedding = self._matrix("embedding", self._inner.embed_tokens.weight)
        head = embedding if self._tied() else self._matrix("head", self._model.lm_head.weight)
        shape = abi.Shape(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=len(calls),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim(config),
            vocabulary=self._model.lm_head.weight.shape[0],
            positions=self._positions,
            max_rows=max_rows,
            activation=activation(config),
            kv_half=kv_dtype == torch.float16,
            epsilon=config.rms_norm_eps,
            embedding_scale=float(getattr(self._inner.embed_tokens, "embed_scale", 1.0)),
            attention_scale=calls[0].scaling,
            attention_softcap=calls[0].softcap or 0.0,
            logit_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
            embedding=embedding,
            head=head,
            final_norm=self._norm(self._inner.norm),
            layer=layers,
        )
        self._kept.append(layers)
        return PackedModel(shape, calls, self._bytes(), self._kept)

    def _tied(self) -> bool:
        head, embedding = self._model.lm_head.weight, self._inner.embed_tokens.weight
        return head.data_ptr() == embedding.data_ptr() or torch.equal(head, embedding)

    def _matrix_shapes(self) -> dict[str, tuple[int, int]]:
        shapes = {"embedding": tuple(self._inner.embed_tokens.weight.shape)}
        if not self._tied():
            shapes["head"] = tuple(self._model.lm_head.weight.shape)
        for number, layer in enumerate(self._inner.layers):
            own, mlp = layer.self_attn, layer.mlp
            heads = sum(linear.weight.shape[0] for linear in (own.q_proj, own.k_proj, own.v_proj))
            shapes[f"layers.{number}.qkv"] = heads, own.q_proj.weight.shape[1]
            shapes[f"layers.{number}.out"] = tuple(own.o_proj.weight.shape)
            shapes[f"layers.{number}.gate_up"] = 2 * mlp.gate_proj.weight.shape[0], mlp.gate_proj.weight.shape[1]
            shapes[f"layers.{number}.down"] = tuple(mlp.down_proj.weight.shape)
        return shapes

    def _layer(self, number: int, call: LayerCall) -> abi.Layer:
        layer = self._inner.layers[number]
        own, mlp = layer.self_attn, layer.mlp
        sandwich = hasattr(layer, "pre_feedforward_layernorm")
        heads = [own.q_proj, own.k_proj, own.v_proj]
        cosines, sines = self._angles(number)
        return abi.Layer(
            qkv=self._matrix(f"layers.{number}.qkv", torch.cat([linear.weight for linear in heads])),
            out=self._matrix(f"layers.{number}.out", own.o_proj.weight),
            gate_up=self._matrix(f"layers.{number}.gate_up", _interleaved(mlp.gate_proj.weight, mlp.up_proj.weight)),
            down=self._matrix(f"layers.{number}.down", mlp.down_proj.weight),
            attention_norm=self._norm(layer.input_layernorm),
            mlp_norm=self._norm(layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm),
            post_attention_norm=self._norm(layer.post_attention_layernorm if sandwich else None),
            post_mlp_norm=self._norm(layer.post_feedforward_layernorm if sandwich else None),
            query_norm=self._norm(getattr(own, "q_norm", None)),
            key_norm=self._norm(getattr(own, "k_norm", None)),
            qkv_bias=self._keep(_biases(heads)),
            out_bias=self._keep(own.o_proj.bias),
            cosines=self._keep(cosines),
            sines=self._keep(sines),
            window=call.window or 0,
        )

    def _matrix(self, name: str, weight: Tensor) -> abi.Matrix:
        kind, (outputs, inputs) = self._kind_of(name), weight.shape
        memory = self._arena.take(self._kernels.packed_bytes(outputs, inputs, kind))
        packed: PackedMatrix = self._kernels.pack(weight, memory, kind)
        self._kept.append(packed)
        return packed.descriptor()

    def _norm(self, module: Any) -> int | None:
        if module is None:
            return None
        # Gemma's norms store how far the weight is from one.
        offset = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
        return self._keep(module.weight.float() + offset)

    def _keep(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
        self._kept.append(tensor)
        return address(tensor)

    def _angles(self, number: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a layer's rotary embedding, [positions, head_dim / 2], as transformers computes them."""
        rotary = self._inner.rotary_emb
        typed = "layer_type" in inspect.signature(rotary.forward).parameters
        kind = self._config.layer_types[number] if typed else None
        if kind not in self._tables:
            places = torch.arange(self._positions, device=self._inner.embed_tokens.weight.device)[None]
            like = torch.zeros(1, device=places.device)
            pair = rotary(like, places, kind) if typed else rotary(like, places)
            half = pair[0].shape[-1] // 2
            cosines, sines = (table[0, :, :half].cpu().contiguous() for table in pair)
            self._tables[kind] = cosines, sines
        return self._tables[kind]

    def _bytes(self) -> int:
        tensors = {thing.data_ptr(): thing.nbytes for thing in self._kept if isinstance(thing, Tensor)}
        return sum(tensors.values()) + sum(thing.data.nbytes for thing in self._kept if isinstance(thing, PackedMatrix))


def _interleaved(gate: Tensor, up: Tensor) -> Tensor:
    parts = [weight.view(-1, _INTERLEAVE, weight.shape[1]) for weight in (gate, up)]
    return torch.stack(parts, dim=1).flatten(0, 2)


def _biases(linears: list[nn.Linear]) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat(
        [torch.zeros(linear.out_features) if linear.bias is None else linear.bias.cpu() for linear in linears]
    )


class _Listener:
    """Stands in for attention once, to see how each layer calls it."""

    def __init__(self) -> None:
        self.calls: dict[int, LayerCall] = {}

    def attend(self, layer: int, call: LayerCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Attention`. A row sees itself only."""
        self.calls[layer] = call
        return value.transpose(0, 1).repeat_interleave(call.heads // call.shape.kv_heads, dim=1)


def layer_calls(model: Any) -> list[LayerCall]:
    """Scale, window and soft cap of each layer, from one pass over one token. Raises UnsupportedFeature."""
    attention.register()
    before = model.config._attn_implementation
    listener = _Listener()
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.model.embed_tokens.weight.device)
    model.set_attn_implementation(attention.IMPLEMENTATION)
    try:
        model(input_ids=ids, position_ids=ids, use_cache=False, paged=listener)
    finally:
        model.set_attn_implementation(before)
    calls = [listener.calls[number] for number in sorted(listener.calls)]
    if len(calls) != model.config.num_hidden_layers or len({(call.scaling, call.softcap) for call in calls}) != 1:
        raise UnsupportedFeature("The fast path cannot run a model whose layers scale their scores differently.")
    return calls


def open_model(packed: PackedModel, kernels: Kernels, isa: int) -> ctypes.c_void_p:
    """A kernel model, to be closed with `llk_close`. Raises UnsupportedFeature or MemoryError."""
    status = ctypes.c_int32()
    handle = kernels.library.llk_open(ctypes.byref(packed.shape), isa, ctypes.byref(status))
    if not handle:
        if status.value == max(abi.MESSAGES):
            raise MemoryError(abi.MESSAGES[status.value])
        raise UnsupportedFeature(f"The fast path cannot run this model: {abi.MESSAGES[status.value]}.")
    return ctypes.c_void_p(handle)
