"""llama.cpp through its C interface, several sequences per batch. Runs in `.peers/llama_cpp`."""

from __future__ import annotations

import time
from typing import Any

import llama_cpp as api
import numpy as np

from bench.sides.calls import Tokens, serve

BATCH = 2048
MICRO_BATCH = 512
"""llama.cpp's defaults."""


class LlamaCpp:
    """Implements `bench.sides.calls.Engine`. A context is made per call, with the room that the call needs."""

    def load(self, model: str, threads: int) -> dict[str, Any]:
        """See `Engine`."""
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(model.encode(), api.llama_model_default_params())
        if not self._model:
            raise OSError(f"llama.cpp cannot load {model}")
        self._threads = threads
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        return {"version": f"llama-cpp-python {api.__version__}", "system": api.llama_print_system_info().decode()}

    def decode(self, prompts: list[Tokens], steps: int) -> dict[str, float]:
        """See `Engine`."""
        with _Context(self, len(prompts), max(map(len, prompts)) + steps + 1) as context:
            tokens = []
            for number, prompt in enumerate(prompts):
                context.compute([(token, place, number) for place, token in enumerate(prompt)], [len(prompt) - 1])
                tokens.append(context.best(len(prompt) - 1))
            start = time.perf_counter()
            for step in range(steps):
                rows = [(token, len(prompts[n]) + step, n) for n, token in enumerate(tokens)]
                context.compute(rows, range(len(rows)))
                tokens = [context.best(row) for row in range(len(rows))]
            return {"tokens": len(prompts) * steps, "seconds": time.perf_counter() - start}

    def prefill(self, prompt: Tokens) -> dict[str, float]:
        """See `Engine`."""
        with _Context(self, 1, len(prompt) + 1) as context:
            start = time.perf_counter()
            context.compute([(token, place, 0) for place, token in enumerate(prompt)], [len(prompt) - 1])
            context.best(len(prompt) - 1)
            return {"tokens": len(prompt), "seconds": time.perf_counter() - start}

    def logits(self, tokens: Tokens, path: str) -> dict[str, Any]:
        """See `Engine`."""
        with _Context(self, 1, len(tokens)) as context:
            context.compute([(token, place, 0) for place, token in enumerate(tokens)], range(len(tokens)))
            np.save(path, np.stack([context.row(place).copy() for place in range(len(tokens))]))
        return {}


class _Context:
    def __init__(self, owner: LlamaCpp, sequences: int, length: int) -> None:
        params = api.llama_context_default_params()
        params.n_ctx = sequences * -(-length // 64) * 64
        params.n_batch, params.n_ubatch, params.n_seq_max = BATCH, MICRO_BATCH, sequences
        params.n_threads = params.n_threads_batch = owner._threads
        self._handle = api.llama_init_from_model(owner._model, params)
        if not self._handle:
            raise MemoryError("llama.cpp cannot make a context")
        self._width = owner._vocabulary
        self._batch = api.llama_batch_init(BATCH, 0, 1)

    def __enter__(self) -> _Context:
        return self

    def __exit__(self, *unused: object) -> None:
        api.llama_batch_free(self._batch)
        api.llama_free(self._handle)

    def compute(self, rows: Any, wanted: Any) -> None:
        """Rows of (token, position, sequence); logits of the wanted ones."""
        asked, batch = set(wanted), self._batch
        for number, (token, position, sequence) in enumerate(rows):
            batch.token[number], batch.pos[number] = token, position
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, sequence
            batch.logits[number] = number in asked
        batch.n_tokens = len(rows)
        if api.llama_decode(self._handle, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def row(self, number: int) -> Any:
        """Logits of a row of the last batch: a view."""
        return np.ctypeslib.as_array(api.llama_get_logits_ith(self._handle, number), shape=(self._width,))

    def best(self, number: int) -> int:
        """The likeliest token after a row."""
        return int(self.row(number).argmax())


if __name__ == "__main__":
    serve(LlamaCpp())
