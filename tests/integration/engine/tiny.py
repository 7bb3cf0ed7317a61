"""Tiny random decoders of several families, written as model folders, and a way to run requests on them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from worker.backend import Attempt, Backend, Epoch, Failure, FinishReason, Output, Sampling, StageDone

VOCABULARY = 131
CONTEXT = 512
SLIDING_WINDOW = 24
# 67: an odd width, so that the last vector of an activation moves with the number of rows.
_GROUPED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 67,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GEMMA: dict[str, Any] = {
    **_GROUPED,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": SLIDING_WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


def _config(family: str) -> Any:
    match family:
        case "llama":
            return transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=False)
        case "llama-tied":
            return transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True, attention_bias=True)
        case "qwen2":
            return transformers.Qwen2Config(**_GROUPED)
        case "qwen3":
            return transformers.Qwen3Config(**_GROUPED, head_dim=16)
        case "gemma2":
            return transformers.Gemma2Config(**_GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=8.0)
        case "gemma3":
            return transformers.Gemma3TextConfig(**_GEMMA)
        case "gpt2":
            ids = dict.fromkeys(("bos_token_id", "eos_token_id"))
            sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
            return transformers.GPT2Config(vocab_size=VOCABULARY, initializer_range=0.3, **sizes, **ids)
    raise ValueError(family)


FAMILIES = ("llama", "llama-tied", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2")


def write(family: str, folder: Path) -> Any:
    """Write a model folder; returns transformers' own model of it, in evaluation mode."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(_config(family))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return model.eval()


def generate(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """transformers' greedy continuation."""
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
    continuation: list[int] = out[0, len(prompt) :].tolist()
    return continuation


def prompts(lengths: Iterable[int], seed: int = 0) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def attempt(name: str, prompt: Sequence[int], max_tokens: int = 16, **options: Any) -> Attempt:
    """Greedy unless `sampling` is given, on the model that the fixture loads."""
    options.setdefault("sampling", Sampling(temperature=0))
    options.setdefault("epoch", Epoch(1, 1))
    return Attempt(request_id=name, model="tiny", prompt=prompt, max_tokens=max_tokens, **options)


class Transcript:
    """Collects what a backend's steps give. Fails on a token out of order."""

    def __init__(self, resumed: Mapping[tuple[str, int], int] | None = None) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.finishes: dict[tuple[str, int], FinishReason] = {}
        self.failures: list[Failure] = []
        self.stages: list[StageDone] = []
        self.outputs: list[Output] = []
        self._resumed = resumed or {}

    def run(self, backend: Backend, steps: int = 10_000) -> Transcript:
        """Step until the backend is idle, at most `steps` times."""
        while steps and backend.busy():
            result = backend.step()
            self.failures.extend(result.failures)
            self.stages.extend(result.stages)
            for output in result.outputs:
                self._take(output)
            steps -= 1
        return self

    def _take(self, output: Output) -> None:
        key = (output.request_id, output.choice)
        tokens = self.tokens.setdefault(key, [])
        assert key not in self.finishes
        assert output.index == self._resumed.get(key, 0) + len(tokens)
        tokens.extend(output.token_ids)
        self.outputs.append(output)
        if output.finish is not None:
            self.finishes[key] = output.finish


def logprobs(found: Transcript) -> dict[tuple[str, int, int], object]:
    """By request, choice and index. Compared bit for bit: they show a difference long before a token does."""
    return {
        (out.request_id, out.choice, index): logprob
        for out in found.outputs
        for index, logprob in enumerate(out.logprobs, start=out.index)
    }
