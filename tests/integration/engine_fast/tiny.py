"""Tiny random models of the families that the fast path knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from worker import kernels
from worker.engine.attention import KVRow
from worker.engine.fast import FastDecoder, FastKVPool, FastRows

VOCABULARY = 131
CONTEXT = 256
WINDOW = 24
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]


def config(family: str) -> Any:
    """transformers' configuration."""
    match family:
        case "llama":
            return transformers.LlamaConfig(**_SIZES, tie_word_embeddings=False, attention_bias=True)
        case "mistral":
            return transformers.MistralConfig(**_SIZES, head_dim=32, sliding_window=WINDOW)
        case "qwen2":
            return transformers.Qwen2Config(**_SIZES, tie_word_embeddings=True)
        case "qwen3":
            return transformers.Qwen3Config(**_SIZES, head_dim=32)
        case "gemma3":
            return transformers.Gemma3TextConfig(
                **_SIZES, head_dim=32, query_pre_attn_scalar=20, sliding_window=WINDOW, layer_types=_KINDS
            )
    raise ValueError(family)


def model(family: str) -> Any:
    """Random weights, the same every time; norms and biases away from their neutral values."""
    torch.manual_seed(1)
    made = transformers.AutoModelForCausalLM.from_config(config(family)).eval()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim == 1:
                weight += 0.1 * torch.randn_like(weight)
    return made


def round_weights(model: Any) -> None:
    """Give every weight the value that its packed form stands for."""
    loaded = kernels.load()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(loaded.unpack(loaded.pack(parameter)))


def text(length: int, seed: int = 0) -> list[int]:
    """Random tokens."""
    found: list[int] = torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found


def prefill(decoder: FastDecoder, pool: FastKVPool, blocks: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Logits of all rows of a text in one call."""
    slots = pool.slots(blocks)
    rows = FastRows(pool, [KVRow(slots, position + 1) for position in range(len(tokens))])
    return decoder.forward(tokens, range(len(tokens)), rows, range(len(tokens)))
