"""Eight adapters in a batch of 16 against none: decode steps of the fast path, the two measured in turn.

    python -m bench.lora --quick --json

Ours is with adapters, the peer without, both in tokens per second.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from bench import command
from bench.kernels import CONTEXT, PROMPT, seconds
from bench.rows import Row, at_least, in_turn
from bench.sides.start import THREADS
from llmos.store import Store, default_store_path, ensure_default
from llmos.store.adapter import TARGETS
from worker.engine.attention import KVRow
from worker.engine.fast import FastDecoder, FastRows, fast_decoder
from worker.engine.lora import Adapter, make_adapter

SEQUENCES, ADAPTERS = 16, 8
ATTENTION = ("q_proj", "v_proj")
"""What PEFT changes by default."""
CASES: tuple[tuple[str, int, Sequence[str], float | None], ...] = (
    ("8 adapters, rank 8, q and v", 8, ATTENTION, 0.8),
    ("8 adapters, rank 16, q and v", 16, ATTENTION, 0.8),
    ("8 adapters, rank 8, all projections", 8, TARGETS, 0.8),
    ("8 adapters, rank 16, all projections", 16, TARGETS, 0.8),
    ("8 adapters, rank 64, all projections", 64, TARGETS, None),
)
QUICK = (CASES[0], CASES[3])


def random_adapter(model: Any, rank: int, targets: Sequence[str], seed: int) -> Adapter:
    """Of the model's shapes; too weak to overflow anything."""
    source = torch.Generator().manual_seed(seed)
    pairs = {}
    for number, layer in enumerate(model.model.layers):
        for name, linear in layer.named_modules():
            target = name.split(".")[-1]
            if target in targets:
                outputs, inputs = linear.weight.shape
                down = torch.randn(rank, inputs, generator=source) * 0.02
                pairs[number, target] = down, torch.randn(outputs, rank, generator=source) * 0.02
    return make_adapter(pairs, 1.0)


class Decode:
    """Sixteen sequences, and the median speed of steps that continue them."""

    def __init__(self, decoder: FastDecoder, steps: int) -> None:
        self._decoder = decoder
        self._steps = steps
        self._pool = decoder.open_pool(SEQUENCES * (CONTEXT // 64))
        each = CONTEXT // 64
        self._slots = [self._pool.slots(range(n * each, (n + 1) * each)) for n in range(SEQUENCES)]
        for slots in self._slots:
            rows = FastRows(self._pool, [KVRow(slots, place + 1) for place in range(PROMPT)])
            decoder.forward(range(PROMPT), range(PROMPT), rows, [])

    def speed(self, adapters: Sequence[int]) -> float:
        """Tokens per second with these adapters of the rows."""
        times = [seconds(lambda at=at: self._step(at, adapters)) for at in range(PROMPT, PROMPT + self._steps)]  # type: ignore[misc]
        return SEQUENCES / statistics.median(times)

    def _step(self, position: int, adapters: Sequence[int]) -> None:
        rows = FastRows(self._pool, [KVRow(slots, position + 1) for slots in self._slots])
        self._decoder.forward(range(SEQUENCES), [position] * SEQUENCES, rows, range(SEQUENCES), adapters)


@torch.inference_mode()
def run(folder: Path, quick: bool, only: str = "") -> Iterator[Row]:
    """All rows whose name contains `only`."""
    disable_progress_bar()
    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    decoder = fast_decoder(model, context_length=CONTEXT)
    rounds, steps = (5, 12) if quick else (11, 24)
    decode = Decode(decoder, steps)
    mixed = [1 + row % ADAPTERS for row in range(SEQUENCES)]
    for case, rank, targets, target in QUICK if quick else CASES:
        if only not in case:
            continue
        for number in range(1, ADAPTERS + 1):
            decoder.put_adapter(number, random_adapter(model, rank, targets, number))
        decode.speed(mixed)
        speeds = in_turn(rounds, [lambda _: decode.speed(mixed), lambda _: decode.speed(())])
        yield at_least(case, "tokens/s", *speeds, target)


def main() -> int:
    """Print the table; see `bench.command` for the exit status."""
    options = command.parser("lora", __doc__ or "", "fewer rounds, smaller ranks").parse_args()
    store = Store(default_store_path())

    def measure(_: list[str]) -> Iterator[Row]:
        return run(store.materialize(ensure_default(store)), options.quick, options.only)

    return command.run("lora", options, measure)


if __name__ == "__main__":
    sys.exit(main())
