"""llmos's engine, loaded, admitted to and stepped as the worker's engine process does it."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.sides import adapters
from bench.sides.calls import Tokens, serve
from llmos.store import Store
from llmos.store.planning import ensure_plan
from llmos.store.precision import PrecisionPlan
from worker.backend import Attempt, Epoch, ModelSpec, Sampling
from worker.backends.torch import TorchBackend
from worker.engine.attention import KVRow
from worker.engine.engine import EngineOptions
from worker.engine.loading import load

MODEL = "model"
MEMORY = 6 << 30
LOGIT_ROWS = 64
GREEDY = Sampling(temperature=0.0)


class Ours:
    """Implements `bench.sides.calls.Engine`."""

    def load(self, model: str, threads: int, precision: str, drafting: bool) -> dict[str, Any]:
        """See `Engine`."""
        self._folder = Path(model)
        self._backend = TorchBackend(
            threads=threads,
            precision=precision,  # type: ignore[arg-type]
            options=EngineOptions(drafting=drafting),
        )
        self._plan = _plan(self._folder) if self._backend.precision == "auto" else None
        self._backend.load(ModelSpec(name=MODEL, version="", folder=self._folder, plan=self._plan), MEMORY)
        self._numbers = itertools.count(1)
        served = self._backend.precision
        kinds = {"head": "fp32" if served == "auto" else served} if self._plan is None else dict(self._plan.matrices())
        return {"version": f"llmos, {'+'.join(sorted(set(kinds.values())))}", "kinds": kinds}

    def decode(self, prompts: list[Tokens], steps: int, adapter_names: Sequence[str] = ()) -> dict[str, float]:
        """See `Engine`. `adapter_names`: one per prompt; empty: none has one."""
        names = self._admit(prompts, steps + sum(map(len, prompts)), adapter_names=adapter_names)
        self._until_first_tokens(names)
        start, tokens = time.perf_counter(), 0
        for _ in range(steps):
            tokens += sum(len(output.token_ids) for output in self._backend.step().outputs)
        seconds = time.perf_counter() - start
        self._drop(names)
        return {"tokens": tokens, "seconds": seconds}

    def prefill(self, prompt: Tokens) -> dict[str, float]:
        """See `Engine`."""
        start = time.perf_counter()
        names = self._admit([prompt], 2)
        self._until_first_tokens(names)
        seconds = time.perf_counter() - start
        self._drop(names)
        return {"tokens": len(prompt), "seconds": seconds}

    def generate(self, prompt: Tokens, max_tokens: int, temperature: float, seed: int) -> dict[str, float]:
        """Time a whole answer after its first token, in as many steps as it takes: `tokens` and `seconds`."""
        self._until_first_tokens(self._admit([prompt], max_tokens, Sampling(temperature=temperature, seed=seed)))
        start, tokens = time.perf_counter(), 0
        while self._backend.busy():
            tokens += sum(len(output.token_ids) for output in self._backend.step().outputs)
        return {"tokens": tokens, "seconds": time.perf_counter() - start}

    def load_adapters(self, count: int) -> dict[str, list[str]]:
        """Load random adapters; their `names`."""
        names = [f"adapter-{number}" for number in range(count)]
        with tempfile.TemporaryDirectory() as folder:
            for number, name in enumerate(names):
                adapters.write(self._folder, Path(folder) / name, number)
                self._backend.load(ModelSpec(name=name, version="", folder=Path(folder) / name, base=MODEL), 0)
        return {"names": names}

    @torch.inference_mode()
    def logits(self, tokens: Tokens, path: str) -> dict[str, Any]:
        """See `Engine`. What the step loop computes with, asked for all rows."""
        decoder = load(
            self._folder,
            torch.device("cpu"),
            precision=self._backend.precision,
            plan=self._plan,
            kernels=self._backend.kernels,
        )
        blocks = -(-len(tokens) // 64)
        paged = decoder.with_memory(blocks)
        slots = paged.memory.slots(range(blocks))
        found = []
        for first in range(0, len(tokens), LOGIT_ROWS):
            part = range(first, min(first + LOGIT_ROWS, len(tokens)))
            rows = [KVRow(slots, position + 1) for position in part]
            found.append(paged.forward(tokens[first : part.stop], part, rows, range(len(part))))
        np.save(path, torch.cat(found).numpy())
        return {}

    def _admit(
        self,
        prompts: Sequence[Tokens],
        max_tokens: int,
        sampling: Sampling = GREEDY,
        adapter_names: Sequence[str] = (),
    ) -> set[str]:
        names = set()
        for number, prompt in enumerate(prompts):
            name = f"request-{next(self._numbers)}"
            names.add(name)
            self._backend.admit(
                Attempt(
                    request_id=name,
                    epoch=Epoch(1, 1),
                    model=MODEL,
                    prompt=prompt,
                    max_tokens=max_tokens,
                    sampling=sampling,
                    ignore_eos=True,
                    adapter=adapter_names[number] if adapter_names else "",
                )
            )
        return names

    def _until_first_tokens(self, names: set[str]) -> None:
        waiting = set(names)
        while waiting:
            result = self._backend.step()
            if result.failures:
                raise RuntimeError(result.failures[0].message)
            waiting -= {output.request_id for output in result.outputs}

    def _drop(self, names: set[str]) -> None:
        for name in names:
            self._backend.cancel(name)


def _plan(folder: Path) -> PrecisionPlan | None:
    """The plan of a model in the store, measured now if it has none; the store names a folder by its version."""
    store = Store()
    record = ensure_plan(store, store.resolve(folder.name))
    return None if record is None else record.plan


if __name__ == "__main__":
    serve(Ours())
