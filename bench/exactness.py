"""How many disturbed requests give exactly the tokens of the undisturbed run.

    python -m bench.exactness --runs 200 --mode int8

Every request is run alone, without prefix cache and drafting; then it is interrupted and resumed at a random index,
preempted, put into other batches, and continued from the prefix cache. A row says how many of the disturbed runs gave
the same tokens and the same end, choice by choice.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from bench.disturbance import DISTURBANCES, Bench
from bench.kernels import Row
from llmos.store import Store, default_store_path, ensure_default
from worker.backend import Attempt, Epoch, Sampling
from worker.engine.device import select_device
from worker.engine.loading import load
from worker.engine.lora import Adapter, make_adapter
from worker.engine.paged import Servable

MODES = ("fp32", "int8")
DEFAULT_MODE = "fp32"
"""What a worker serves in unless told otherwise; it must be exact in every run."""
REQUESTS = 10
ANSWER = 32
LENGTHS = (66, 140)
"""Least and most tokens of a prompt: a block can be cached."""
LORA = "lora"

Text = Callable[[int, int], list[int]]
"""A prompt of so many tokens; the first number says which."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of request. `repeats`: its text repeats itself, so that drafts come true."""

    name: str
    sampling: Sampling
    choices: int = 1
    adapter: str = ""
    repeats: bool = False

    def attempts(self, text: Text, count: int, source: random.Random) -> list[Attempt]:
        """Requests of different prompts and seeds."""
        return [self._attempt(number, text, source) for number in range(count)]

    def _attempt(self, number: int, text: Text, source: random.Random) -> Attempt:
        length = source.randrange(*LENGTHS)
        prompt = text(number, length)
        if self.repeats:
            prompt = (prompt[:24] * (length // 24 + 1))[:length]
        return Attempt(
            request_id=f"{self.name} {number}",
            epoch=Epoch(1, 1),
            model="m",
            prompt=prompt,
            max_tokens=ANSWER,
            choices=self.choices,
            sampling=replace(self.sampling, seed=source.getrandbits(64)),
            adapter=self.adapter,
        )


KINDS = (
    Kind("greedy", Sampling(temperature=0)),
    Kind("sampled", Sampling(temperature=0.8, top_p=0.95)),
    Kind("n=4", Sampling(temperature=1.0), choices=4),
    Kind(
        "penalties",
        Sampling(temperature=0.7, top_k=50, repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.2),
    ),
    Kind("LoRA", Sampling(temperature=0.8), adapter=LORA),
    Kind("drafting", Sampling(temperature=0.3), repeats=True),
)


def measure(
    bench: Bench, kind: Kind, text: Text, runs: int, requests: int = REQUESTS
) -> Iterator[tuple[str, int, int]]:
    """Per disturbance: how many runs were exact, and how many there were, about `runs`."""
    attempts = kind.attempts(text, min(runs, REQUESTS), random.Random(kind.name))
    expected = bench.undisturbed(attempts)
    for name, disturb in DISTURBANCES.items():
        exact = total = 0
        for number in range(-(-runs // len(attempts))):
            found, disturbed = disturb(bench, attempts, expected, random.Random(number))
            exact += found
            total += disturbed
        yield name, exact, total


def random_adapter(decoder: Servable, hidden: int, seed: int = 1) -> Adapter:
    """Changes the output projection of every layer's attention, enough to change what is said."""
    made = torch.Generator().manual_seed(seed)
    pairs = {
        (layer, "o_proj"): (
            torch.randn(8, hidden, generator=made) * 0.05,
            torch.randn(hidden, 8, generator=made) * 0.05,
        )
        for layer in range(len(decoder.layers))
    }
    return make_adapter(pairs, 1.0)


def tables(folder: Path, modes: Sequence[str], kinds: Sequence[str], runs: int) -> Iterator[Row]:
    """A row per mode, kind of request and disturbance."""
    disable_progress_bar()
    text = _texts(folder)
    hidden = int(json.loads((folder / "config.json").read_text())["hidden_size"])
    for mode in modes:
        decoder = load(folder, select_device("cpu"), kernels=mode == "int8")
        bench = Bench(decoder, {LORA: random_adapter(decoder, hidden)})
        for kind in KINDS:
            if kind.name in kinds:
                target = 1.0 if mode == DEFAULT_MODE else None
                for name, exact, total in measure(bench, kind, text, runs):
                    share = exact / total
                    case = f"{mode}, {kind.name}, {name}"
                    yield Row(case, exact, total, "runs", round(share, 4), target, target is None or share >= target)


def _texts(folder: Path) -> Text:
    """Prompts from the standard library's documentation texts."""
    from pydoc_data.topics import topics

    ids: list[int] = AutoTokenizer.from_pretrained(folder)("".join(topics[name] for name in sorted(topics)))[
        "input_ids"
    ]

    def text(number: int, length: int) -> list[int]:
        first = number * 997 % (len(ids) - length)
        return ids[first : first + length]

    return text


def main() -> int:
    """Print the table; 1 if the default mode is not exact."""
    parser = argparse.ArgumentParser(prog="python -m bench.exactness", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the default mode only, 10 runs")
    parser.add_argument("--json", action="store_true", help="one JSON array instead of a table")
    parser.add_argument("--model", type=Path, help="folder of a model; by default the store's default model")
    parser.add_argument("--runs", type=int, default=200, help="runs per kind of request and disturbance")
    parser.add_argument("--mode", action="append", choices=MODES, help="may be given again; by default all")
    parser.add_argument("--kind", action="append", choices=[kind.name for kind in KINDS], help="the same")
    options = parser.parse_args()
    modes = options.mode or ([DEFAULT_MODE] if options.quick else MODES)
    kinds = options.kind or [kind.name for kind in KINDS]
    rows = []
    for row in tables(options.model or _default_model(), modes, kinds, 10 if options.quick else options.runs):
        rows.append(row)
        if not options.json:
            print(f"{row.case:40} {row.ours:5} {row.peer:5} {row.unit} {row.ratio:8} {row.target!s:>6} {row.ok}")
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    return 0 if all(row.ok for row in rows) else 1


def _default_model() -> Path:
    store = Store(default_store_path())
    return store.materialize(ensure_default(store))


if __name__ == "__main__":
    sys.exit(main())
