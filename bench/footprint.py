"""One model in one process: what it was predicted to take, and what it really takes. A child of `bench.ledger`.

Measured are the pages of the process's own (RssAnon, swap included) and the tensors that stay in mapped files, at their
most during a load of prompts and answers, less the KV blocks (all touched before), which the ledger counts apart.
"""

from __future__ import annotations

import argparse
import json
import sys

from llmos.store import Store
from worker.backend import Attempt, Epoch, ModelSpec, Sampling, Task
from worker.backends.torch import TorchBackend
from worker.demand import LOGIT_ROWS
from worker.engine import footprint
from worker.models import demand_of

_SEQUENCES, _PROMPT, _ANSWER = LOGIT_ROWS, 40, 4


def measured(name: str, precision: str) -> dict[str, float]:
    """Bytes: predicted, measured at load, measured under load."""
    store = Store()
    manifest = store.resolve(name)
    folder, record = store.materialize(manifest), store.plan(manifest)
    plan = record.plan if record is not None else None
    need = demand_of(manifest, folder, plan, precision)  # type: ignore[arg-type]
    backend = TorchBackend(threads=2, precision=precision)  # type: ignore[arg-type]
    before = footprint.settled()
    spec = ModelSpec(manifest.name, manifest.version, folder, context_length=manifest.context_length, plan=plan)
    budget = need.weights + need.workspace + 4096 * max(1, need.kv_per_token)
    blocks = backend.load(spec, budget * 5 // 4)
    _touch_all(backend, manifest.name, blocks.total)
    loaded = footprint.settled()
    kept = backend.footprint(manifest.name)
    cache = blocks.total * kept.per_block
    mapped = kept.fixed - need.workspace - (loaded - before - cache)
    peak = loaded
    for attempt in _attempts(manifest.name, "embed" in manifest.capabilities, manifest.vocab_size):
        backend.admit(attempt)
    while backend.busy():
        backend.step()
        peak = max(peak, footprint.own_bytes())
    return {
        "predicted": need.weights + need.workspace,
        "predicted_weights": need.weights,
        "weights": kept.fixed - need.workspace,
        "under_load": peak - before + mapped - cache,
    }


def _touch_all(backend: TorchBackend, name: str, blocks: int) -> None:
    """Write to every KV block: in huge pages, one that is touched counts for many that are not."""
    paged = getattr(backend._engines[name], "_paged", None)
    for block in range(blocks if paged is not None else 0):
        paged.memory.copy_block((block + 1) % blocks, block)


def _attempts(name: str, embeds: bool, vocabulary: int) -> list[Attempt]:
    task = Task.EMBED if embeds else Task.GENERATE
    return [
        Attempt(
            request_id=f"r{number}",
            epoch=Epoch(1, 1),
            model=name,
            prompt=[(31 * place + 7 * number) % min(1000, vocabulary - 1) + 1 for place in range(_PROMPT)],
            max_tokens=1 if embeds else _ANSWER,
            ignore_eos=True,
            sampling=Sampling(temperature=1.0, seed=number),
            task=task,
        )
        for number in range(_SEQUENCES)
    ]


def main() -> int:
    """Entry point of the child."""
    parser = argparse.ArgumentParser(prog="python -m bench.footprint", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("precision")
    options = parser.parse_args()
    sys.stdout.write(json.dumps(measured(options.model, options.precision)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
