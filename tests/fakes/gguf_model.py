"""A tiny Llama with a byte-level tokenizer as a GGUF file, written by the `gguf` library from a transformers model.

Imports torch: for tests marked `torch`.
"""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.fakes.models import TEMPLATE

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "Ġ Ġ", "1 2"]
NORMAL, CONTROL = 1, 3
BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def vocabulary() -> list[str]:
    """Special tokens, one token per byte, one per merge."""
    return [*SPECIALS, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]


def tiny_llama() -> LlamaForCausalLM:
    """Two layers, grouped heads, tied embeddings, random weights that are the same every time."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(path: Path, model: LlamaForCausalLM, *, quantized: bool = False) -> Path:
    """The model as llama.cpp's converter writes it; `quantized` stores the matrices of the MLP as Q8_0."""
    writer = GGUFWriter(path, "llama")
    _write_metadata(writer, model.config)
    weights = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(model.config.num_hidden_layers):
        for short, name in BLOCK.items():
            data = weights[f"model.layers.{layer}.{name}.weight"]
            _write_tensor(writer, f"blk.{layer}.{short}.weight", data, model.config, quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tensor(
    writer: GGUFWriter, name: str, data: NDArray[numpy.float32], config: LlamaConfig, quantized: bool
) -> None:
    if "attn_q" in name:
        data = _interleaved(data, config.num_attention_heads)
    if "attn_k" in name:
        data = _interleaved(data, config.num_key_value_heads)
    if quantized and name.split(".")[2] in ("ffn_gate", "ffn_up", "ffn_down"):
        kind = GGMLQuantizationType.Q8_0
        writer.add_tensor(name, quantize(data, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, data)


def _interleaved(weight: NDArray[numpy.float32], heads: int) -> NDArray[numpy.float32]:
    """Rows in the order of llama.cpp's rotary embedding, which pairs neighbours instead of halves."""
    rows, columns = weight.shape
    return numpy.ascontiguousarray(
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def _write_metadata(writer: GGUFWriter, config: LlamaConfig) -> None:
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = vocabulary()
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL] * len(SPECIALS) + [NORMAL] * (len(tokens) - len(SPECIALS)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
