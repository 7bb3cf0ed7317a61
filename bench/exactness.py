"""How many disturbed requests give exactly the tokens of the undisturbed run.

    python -m bench.exactness --runs 200 --mode auto

Every request is run alone, without prefix cache and drafting; then it is interrupted and resumed at a random index,
preempted, put into other batches, and continued from the prefix cache. A row says how many of the disturbed runs gave
the same tokens and the same end, choice by choice.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from bench import command
from bench.disturbance import DISTURBANCES, Bench
from bench.rows import Row
from bench.subject import Prompts, default_model, plan_of, prompts_of, small_model
from llmos.clock import SystemClock
from llmos.store.precision import Precision
from worker.backend import Attempt, Constraint, Epoch, Sampling
from worker.backends.torch import TorchBackend
from worker.engine.grammar.grammars import open_grammars
from worker.engine.grammar.guard import Guard
from worker.engine.loading import load
from worker.engine.lora import Adapter, make_adapter
from worker.engine.paged import Servable

MODES = ("auto", "fp32", "fp16", "int8")
DEFAULT_MODE = "auto"
"""What a worker serves in unless told otherwise; it must be exact in every run."""
REQUESTS = 10
ANSWER = 32
LENGTHS = (66, 140)
"""Least and most tokens of a prompt: a block can be cached."""
LORA = "lora"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9999}, "maxItems": 6},
        "kind": {"enum": ["city", "river", "mountain"]},
    },
    "required": ["name", "sizes", "kind"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of request. `repeats`: its text repeats itself, so that drafts come true."""

    name: str
    sampling: Sampling
    choices: int = 1
    adapter: str = ""
    repeats: bool = False
    constraint: Constraint | None = None

    def attempts(self, text: Prompts, count: int, source: random.Random) -> list[Attempt]:
        """Requests of different prompts and seeds."""
        return [self._attempt(number, text, source) for number in range(count)]

    def _attempt(self, number: int, text: Prompts, source: random.Random) -> Attempt:
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
            constraint=self.constraint,
        )


KINDS = (
    Kind("greedy", Sampling(temperature=0)),
    Kind("sampled", Sampling(temperature=0.8, top_p=0.95)),
    Kind("n=4", Sampling(temperature=1.0), choices=4),
    Kind(
        "penalties",
        Sampling(temperature=0.7, top_k=50, repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.2),
    ),
    Kind("JSON", Sampling(temperature=0.8), constraint=Constraint("json_schema", json.dumps(SCHEMA))),
    Kind("LoRA", Sampling(temperature=0.8), adapter=LORA),
    Kind("drafting", Sampling(temperature=0.3), repeats=True),
)


def measure(
    bench: Bench, kind: Kind, text: Prompts, runs: int, requests: int = REQUESTS
) -> Iterator[tuple[str, int, int]]:
    """Per disturbance: how many runs were exact, and how many there were, `runs` at least."""
    attempts = kind.attempts(text, min(runs, REQUESTS), random.Random(kind.name))
    expected = bench.undisturbed(attempts)
    for name, disturb in DISTURBANCES.items():
        exact = total = rounds = 0
        while total < runs and rounds < 2 * runs:  # a round may leave some undisturbed: they had ended before
            found, disturbed = disturb(bench, attempts, expected, random.Random(rounds))
            exact, total, rounds = exact + found, total + disturbed, rounds + 1
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


def tables(
    folder: Path, modes: Sequence[Precision], only: str, runs: int, label: str = "", device: str = "cpu"
) -> Iterator[Row]:
    """A row per mode, kind of request and disturbance; `label` precedes their names."""
    disable_progress_bar()
    text = prompts_of(folder)
    for mode in modes:
        with opened(folder, mode, device) as bench:
            for kind in KINDS:
                if only in f"{mode}, {kind.name}":
                    for name, exact, total in measure(bench, kind, text, runs):
                        yield _row(mode, f"{label}{mode}, {kind.name}, {name}", exact, total)


def _row(mode: str, case: str, exact: int, total: int) -> Row:
    target = 1.0 if mode == DEFAULT_MODE else None
    return Row(case, exact, total, "runs", round(exact / total, 4), target, target is None or exact == total)


@contextmanager
def opened(folder: Path, mode: Precision, device: str = "cpu") -> Iterator[Bench]:
    """A model in a mode, with an adapter and what follows constraints."""
    backend = TorchBackend(threads=torch.get_num_threads(), precision=mode, device=device)
    plan = plan_of(folder) if backend.precision == "auto" and backend.device.type == "cpu" else None
    decoder = load(folder, backend.device, precision=backend.precision, plan=plan, kernels=backend.kernels)
    hidden = int(json.loads((folder / "config.json").read_text())["hidden_size"])
    guard = Guard(SystemClock())
    grammars = open_grammars(guard, folder, decoder.vocabulary, decoder.end_tokens, SystemClock())
    try:
        yield Bench(decoder, {LORA: random_adapter(decoder, hidden)}, grammars)
    finally:
        if grammars is not None:
            grammars.close()
        guard.close()


def main() -> int:
    """See `bench.command`."""
    parser = command.parser("exactness", __doc__, "10 runs of each, in the default mode")
    parser.add_argument("--model", type=Path, help="folder of a model; by default the store's default model")
    parser.add_argument("--small", action="store_true", help="a small random model: for modes that compute slowly")
    parser.add_argument("--runs", type=int, default=200, help="of each kind of request and disturbance")
    parser.add_argument("--mode", action="append", choices=MODES, help="may be given again; by default all")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; on CUDA the default mode is bf16")
    options = parser.parse_args()
    modes = options.mode or ([DEFAULT_MODE] if options.quick else MODES)
    runs = min(options.runs, 10) if options.quick else options.runs
    with tempfile.TemporaryDirectory() as made:
        folder = small_model(Path(made)) if options.small else options.model or default_model()
        label = ("" if options.device == "cpu" else "CUDA, ") + ("small model, " if options.small else "")
        return command.run(
            "exactness", options, lambda _: tables(folder, modes, options.only, runs, label, options.device)
        )


if __name__ == "__main__":
    sys.exit(main())
