"""A decoder from a folder: transformers' own modules with our attention and our layers inside."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from llmos.errors import SourceError, UnsupportedFeature
from llmos.store.precision import PrecisionPlan
from worker.demand import workspace_bytes
from worker.engine import attention
from worker.engine.adapted import AdaptedLayers
from worker.engine.attention import Attention, KVRow, LayerCall, PagedAttention
from worker.engine.grouped import GroupedLinear
from worker.engine.kv import KVPool, LayerShape, block_bytes
from worker.engine.layers import FixedRowLinear, steady_layers, tile_rows, unknown_weights
from worker.engine.lora import Adapter
from worker.engine.paged import Paged
from worker.engine.planned import apply_plan

log = logging.getLogger(__name__)

DTYPE = torch.float32
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_LENGTH_DEPENDENT_ROPE = "longrope"


@dataclass(frozen=True, slots=True)
class Decoder:
    """A loaded model. Call under `torch.inference_mode`, from one thread."""

    model: nn.Module
    layers: Sequence[LayerShape]
    vocabulary: int
    context_length: int | None
    """Most tokens of prompt and answer together; None: no limit."""
    end_tokens: frozenset[int]
    device: torch.device
    weight_bytes: int
    adapted: AdaptedLayers
    kv_dtype: torch.dtype = DTYPE

    @property
    def workspace_bytes(self) -> int:
        """See `Servable`."""
        if self.device.type == "cpu":
            return workspace_bytes(self.vocabulary)
        # One block takes what padding writes.
        return workspace_bytes(self.vocabulary, cuda=True) + block_bytes(self.layers, self.kv_dtype)

    def with_memory(self, blocks: int) -> Paged:
        """See `Servable`."""
        if self.device.type != "cuda":
            return PagedDecoder(self, KVPool(self.layers, blocks, self.device, DTYPE))
        from worker.engine.cuda.decoder import PagedCudaDecoder

        return PagedCudaDecoder(self, blocks)

    def put_adapter(self, number: int, adapter: Adapter) -> None:
        """See `AdapterHolder`."""
        self.adapted.put(number, adapter)

    def drop_adapter(self, number: int) -> None:
        """See `AdapterHolder`."""
        self.adapted.drop(number)

    def forward(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        attend: Attention,
        wanted: Sequence[int],
        adapters: Sequence[int] = (),
    ) -> Tensor:
        """One pass over rows of any sequences, one token each. Logits of the rows in `wanted`: [wanted, vocabulary].

        `adapters` are the numbers of the rows' adapters; empty: none has one.
        """
        self.adapted.assign(adapters)
        padding = [0] * (-len(tokens) % tile_rows(self.device))
        out = self.model(
            input_ids=torch.tensor([[*tokens, *padding]], device=self.device),
            position_ids=torch.tensor([[*positions, *padding]], device=self.device),
            logits_to_keep=torch.tensor(wanted, dtype=torch.int64, device=self.device),
            use_cache=False,
            paged=attend,
        )
        logits: Tensor = out.logits[0]
        return logits


@dataclass(frozen=True, slots=True)
class PagedDecoder:
    """Implements `worker.engine.paged.Paged`."""

    decoder: Decoder
    memory: KVPool

    def forward(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        rows: Sequence[KVRow],
        wanted: Sequence[int],
        adapters: Sequence[int] = (),
    ) -> Tensor:
        """See `Paged`."""
        targets = torch.stack([row.slots[row.length - 1] for row in rows])
        return self.decoder.forward(tokens, positions, PagedAttention(self.memory, rows, targets), wanted, adapters)


def read(folder: Path, device: torch.device, *, dtype: torch.dtype | str = DTYPE) -> Any:
    """transformers' model of a folder of safetensors and config.json; `dtype` "auto": in the files' own type.

    Weights that need no conversion stay in the files, mapped into memory.

    Raises SourceError or UnsupportedFeature if it cannot serve.
    """
    attention.register()
    transformers.utils.logging.disable_progress_bar()
    model = _read(folder, dtype).to(device).eval().requires_grad_(False)
    _check_config(model, model.config.get_text_config())
    return model


def prepare(model: Any, device: torch.device, context_length: int = 0, plan: PrecisionPlan | None = None) -> Decoder:
    """Change a model that was read, in place, so that its rows do not depend on each other. Raises UnsupportedFeature.

    `context_length` lowers the model's own limit; 0 keeps it. `plan`: in which precision; None: all fp32.
    """
    config = model.config.get_text_config()
    with torch.inference_mode():
        if plan is not None:
            apply_plan(model, plan)
        steady_layers(model)
        if device.type == "cuda":
            from worker.engine.cuda.norms import fuse_norms

            fuse_norms(model)
        if strange := unknown_weights(model):
            raise UnsupportedFeature(f"The torch backend cannot run layers like {strange[0]} yet.")
        layers = _probe(model, config)
    return Decoder(
        model=model,
        layers=layers,
        vocabulary=config.vocab_size,
        context_length=context_limit(config, context_length),
        end_tokens=end_tokens(model, config),
        device=device,
        weight_bytes=_weight_bytes(model) if device.type == "cpu" else _storage_bytes(model),
        adapted=AdaptedLayers(model, device),
        kv_dtype=DTYPE if device.type == "cpu" else model.dtype,
    )


def _read(folder: Path, dtype: torch.dtype | str) -> Any:
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention.IMPLEMENTATION,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        log.warning("%s cannot be loaded: %s", folder, error)
        raise SourceError("The model's folder holds no decoder that transformers can load.") from error
    # transformers would go on with random numbers in their place.
    if missing := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise SourceError(
            f"The model's files lack {len(missing)} weights that it needs, or hold them in another shape."
        )
    return model


def _check_config(model: Any, config: Any) -> None:
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedFeature(f"{name} does not let its attention be replaced.")
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise UnsupportedFeature(f"{name} cannot give the logits of chosen rows.")
    strange = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if strange:
        raise UnsupportedFeature(f"{name} has layers of another kind: {', '.join(sorted(strange))}.")


class _Probe:
    """Stands in for attention once, to see how each layer calls it."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, LayerCall]] = []

    def attend(self, layer: int, call: LayerCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Attention`. A row sees itself only."""
        self.calls.append((layer, call))
        return value.transpose(0, 1).repeat_interleave(call.heads // call.shape.kv_heads, dim=1)


def _probe(model: nn.Module, config: Any) -> list[LayerShape]:
    """KV shape of each layer, from one pass over one tile: no model's configuration needs to be understood."""
    probe = _Probe()
    device = next(model.parameters()).device
    ids = torch.zeros(1, tile_rows(device), dtype=torch.int64, device=device)
    try:
        model(
            input_ids=ids,
            position_ids=torch.arange(ids.shape[1], device=device)[None],
            logits_to_keep=ids[0, :1],
            use_cache=False,
            paged=probe,
        )
    except (TypeError, ValueError) as error:
        raise UnsupportedFeature(f"{type(model).__name__} does not run on paged attention: {error}") from error
    if [layer for layer, _ in probe.calls] != list(range(config.num_hidden_layers)):
        raise UnsupportedFeature(f"{type(model).__name__} has layers that do not call attention once each, in order.")
    kinds = getattr(config, "layer_types", None) or ()
    for kind, (layer, call) in zip(kinds, probe.calls, strict=bool(kinds)):
        if kind == "sliding_attention" and call.window is None:
            raise UnsupportedFeature(f"Layer {layer} of {type(model).__name__} does not say how wide its window is.")
    return [call.shape for _, call in probe.calls]


def context_limit(config: Any, wanted: int = 0) -> int | None:
    """Most tokens of prompt and answer together, `wanted` if that is less and not 0; None: no limit."""
    return min(filter(None, (wanted, _context_length(config))), default=None)


def _context_length(config: Any) -> int | None:
    limit: int | None = getattr(config, "max_position_embeddings", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    per_layer = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    for rope in per_layer:
        if rope.get("rope_type") == _LENGTH_DEPENDENT_ROPE:
            # Past this length the frequencies of all rows of a step would change with the longest one.
            limit = min(rope["original_max_position_embeddings"], limit or rope["original_max_position_embeddings"])
    return limit


def end_tokens(model: Any, config: Any) -> frozenset[int]:
    """Tokens that end an answer, by the model's configuration and its generation's."""
    found: set[int] = set()
    for source in (config, model.generation_config):
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or ())
    return frozenset(found)


def _weight_bytes(model: nn.Module) -> int:
    linears = sum(
        module.weight_bytes for module in model.modules() if isinstance(module, FixedRowLinear | GroupedLinear)
    )
    return linears + sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _storage_bytes(model: nn.Module) -> int:
    """Where layers hold no copies of their own: every tensor once, though two layers share it."""
    linears = (layer for layer in model.modules() if isinstance(layer, FixedRowLinear))
    tensors = [*model.parameters(), *model.buffers(), *(tensor for layer in linears for tensor in layer.tensors())]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())
