"""transformers in fp32 with its dynamic cache. Runs in our own environment."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import transformers

from bench.sides.calls import Tokens, serve


class Transformers:
    """Implements `bench.sides.calls.Engine`."""

    def load(self, model: str, threads: int) -> dict[str, Any]:
        """See `Engine`."""
        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        return {"version": f"transformers {transformers.__version__}, torch {torch.__version__}"}

    @torch.inference_mode()
    def decode(self, prompts: list[Tokens], steps: int) -> dict[str, float]:
        """See `Engine`. All prompts have one length, so that none is padded."""
        out = self._model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(steps):
            tokens = out.logits[:, -1].argmax(-1, keepdim=True)
            out = self._model(tokens, past_key_values=out.past_key_values, use_cache=True)
        out.logits[:, -1].argmax(-1)
        return {"tokens": len(prompts) * steps, "seconds": time.perf_counter() - start}

    @torch.inference_mode()
    def prefill(self, prompt: Tokens) -> dict[str, float]:
        """See `Engine`."""
        start = time.perf_counter()
        self._model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1).logits.argmax(-1)
        return {"tokens": len(prompt), "seconds": time.perf_counter() - start}

    @torch.inference_mode()
    def logits(self, tokens: Tokens, path: str) -> dict[str, Any]:
        """See `Engine`."""
        np.save(path, self._model(torch.tensor([tokens])).logits[0].numpy())
        return {}


if __name__ == "__main__":
    serve(Transformers())
