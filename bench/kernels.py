"""The kernels against torch fp32 in the same run: speed of decode, prefill and products; distance of the logits.

    python -m bench.kernels --quick --json

A row is `case, ours, peer, unit, ratio, target, ok`. For speed the ratio is ours to the peer's, medians, the two
measured in turn; for the distance (mean KL divergence to fp32, in nats) ours to the target.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from llmos.store import Store, default_store_path, ensure_default
from worker.engine.attention import KVRow
from worker.engine.fast import FastDecoder, FastRows, fast_decoder
from worker.kernels import load

CONTEXT = 1024
PROMPT = 40
"""Tokens before the decode steps that are measured."""
KL_TOKENS = 256
KL_TARGET = 0.005


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `target` None: reported only."""

    case: str
    ours: float
    peer: float | None
    unit: str
    ratio: float
    target: float | None
    ok: bool


def faster(case: str, unit: str, ours: list[float], peer: list[float], target: float | None) -> Row:
    """A row from speeds that were measured in turn."""
    mine, theirs = statistics.median(ours), statistics.median(peer)
    ratio = mine / theirs
    return Row(case, round(mine, 2), round(theirs, 2), unit, round(ratio, 2), target, target is None or ratio >= target)


def in_turn(rounds: int, ours: Callable[[], float], peer: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Results of both, alternating, so that what else runs on the machine meets both."""
    pairs = [(ours(), peer()) for _ in range(rounds)]
    return [mine for mine, _ in pairs], [theirs for _, theirs in pairs]


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Ours:
    """Sequences on the fast path."""

    def __init__(self, decoder: FastDecoder, sequences: int) -> None:
        self.decoder = decoder
        self.pool = decoder.open_pool(sequences * (CONTEXT // 64))
        self.slots = [self.pool.slots(range(n * CONTEXT // 64, (n + 1) * CONTEXT // 64)) for n in range(sequences)]

    def prefill(self, sequence: int, tokens: list[int], *, all_logits: bool = False) -> Tensor:
        rows = FastRows(self.pool, [KVRow(self.slots[sequence], place + 1) for place in range(len(tokens))])
        wanted = range(len(tokens)) if all_logits else [len(tokens) - 1]
        return self.decoder.forward(tokens, range(len(tokens)), rows, wanted)

    def decode(self, tokens: list[int], position: int) -> Tensor:
        count = len(tokens)
        rows = FastRows(self.pool, [KVRow(slots, position + 1) for slots in self.slots[:count]])
        return self.decoder.forward(tokens, [position] * count, rows, range(count))


def decode(model: Any, decoder: FastDecoder, ids: list[int], sequences: int, steps: int, rounds: int) -> Row:
    """Tokens per second of batched decode steps; the peer is transformers in fp32 with its dynamic cache."""
    ours = Ours(decoder, sequences)
    prompts = [ids[n : n + PROMPT] for n in range(sequences)]

    def own() -> float:
        for number, prompt in enumerate(prompts):
            ours.prefill(number, prompt)
        return rate(lambda place: ours.decode(ids[place : place + sequences], place))

    def theirs() -> float:
        cache = model(torch.tensor(prompts), use_cache=True, logits_to_keep=1).past_key_values
        return rate(
            lambda place: model(torch.tensor(ids[place : place + sequences])[:, None], past_key_values=cache).logits
        )

    def rate(step: Callable[[int], object]) -> float:
        times = [seconds(lambda place=place: step(place)) for place in range(PROMPT, PROMPT + steps)]  # type: ignore[misc]
        return sequences / statistics.median(times)

    target = {1: 2.0, 4: 3.0, 16: 3.0}[sequences]
    return faster(f"decode, {sequences} sequences", "tokens/s", *in_turn(rounds, own, theirs), target)


def prefill(model: Any, decoder: FastDecoder, ids: list[int], rounds: int) -> Row:
    """Tokens per second of a prompt, in steps of 128 rows as the engine takes it; the peer takes it at once."""
    tokens = ids[:256]
    ours = Ours(decoder, 1)
    every = [KVRow(ours.slots[0], place + 1) for place in range(len(tokens))]

    def chunks() -> None:
        for first in range(0, len(tokens), 128):
            part = slice(first, first + 128)
            rows = FastRows(ours.pool, every[part])
            decoder.forward(tokens[part], range(first, first + 128), rows, [127] if first + 128 == len(tokens) else [])

    def theirs() -> None:
        model(torch.tensor([tokens]), logits_to_keep=1)

    speeds = in_turn(rounds, lambda: len(tokens) / seconds(chunks), lambda: len(tokens) / seconds(theirs))
    return faster("prefill, 256 tokens", "tokens/s", *speeds, None)


def products(rounds: int) -> Iterator[Row]:
    """One thread, a matrix that fits no cache level but the last: 1536 outputs, 576 inputs."""
    kernels, weight = load(), torch.randn(1536, 576)
    packed, isa = kernels.pack(weight), kernels.isa
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for count in (1, 16):
        x = torch.randn(count, 576)
        work = 2.0 * count * weight.numel() * 1e-9

        def own(x: Tensor = x, work: float = work) -> float:
            return work / min(
                seconds(lambda: kernels.gemm(packed, *kernels.quantize(x, isa=isa), isa)) for _ in range(9)
            )

        def theirs(x: Tensor = x, work: float = work) -> float:
            return work / min(seconds(lambda: nnf.linear(x, weight)) for _ in range(9))

        yield faster(f"product, {count} rows", "GFLOP/s", *in_turn(rounds, own, theirs), None)
    torch.set_num_threads(threads)


def distance(model: Any, decoder: FastDecoder, ids: list[int]) -> Row:
    """Mean KL divergence of our next-token distribution from fp32's."""
    tokens = ids[:KL_TOKENS]
    expected = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    found = Ours(decoder, 1).prefill(0, tokens, all_logits=True).double().log_softmax(-1)
    kl = float((expected.exp() * (expected - found)).sum(-1).mean())
    return Row(
        f"KL to fp32, {KL_TOKENS} tokens",
        round(kl, 5),
        0.0,
        "nats",
        round(kl / KL_TARGET, 2),
        KL_TARGET,
        kl <= KL_TARGET,
    )


def text_ids(folder: Path) -> list[int]:
    """Token ids of the standard library's documentation texts."""
    from pydoc_data.topics import topics

    text = "".join(topics[name] for name in ("class", "with", "for", "while"))
    ids: list[int] = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    return ids


@torch.inference_mode()
def run(folder: Path, threads: int, quick: bool) -> Iterator[Row]:
    """All rows."""
    disable_progress_bar()
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    decoder, ids = fast_decoder(model, context_length=CONTEXT), text_ids(folder)
    rounds, steps = (2, 8) if quick else (5, 24)
    yield distance(model, decoder, ids)
    for sequences in (1, 4, 16):
        yield decode(model, decoder, ids, sequences, steps, rounds)
    yield prefill(model, decoder, ids, rounds)
    yield from products(rounds)


def main() -> int:
    """Print the table; 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", action="store_true", help="one JSON array instead of a table")
    parser.add_argument("--model", type=Path, help="folder of a model; by default the store's default model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    rows = []
    for row in run(options.model or _default_model(), options.threads, options.quick):
        rows.append(row)
        if not options.json:
            print(
                f"{row.case:28} {row.ours:10} {row.peer!s:>10} {row.unit:10} {row.ratio:6} {row.target!s:>6} {row.ok}"
            )
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    return 0 if all(row.ok for row in rows) else 1


def _default_model() -> Path:
    store = Store(default_store_path())
    return store.materialize(ensure_default(store))


if __name__ == "__main__":
    sys.exit(main())
