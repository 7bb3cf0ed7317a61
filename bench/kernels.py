"""The kernels against torch fp32 in the same run: speed of decode, prefill and products; distance of the logits.

    python -m bench.kernels --quick --json

For speed the peer is torch; the distance is the mean KL divergence to fp32, in nats, against its bound. Neither the
step loop nor other engines are in it: that is `bench.engine`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from bench import command
from bench.corpus import Texts
from bench.rows import Row, at_least, bounded, in_turn
from llmos.store import Store, default_store_path, ensure_default
from worker.engine.attention import KVRow
from worker.engine.fast import FastDecoder, FastRows, fast_decoder
from worker.kernels import load

CONTEXT = 1024
PROMPT = 40
"""Tokens before the decode steps that are measured."""
KL_TOKENS = 256
KL_TARGET = 0.005


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
    mine, others = in_turn(rounds, [lambda _: own(), lambda _: theirs()])
    return at_least(f"decode, {sequences} sequences", "tokens/s", mine, others, target)


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

    mine, others = in_turn(rounds, [lambda _: len(tokens) / seconds(chunks), lambda _: len(tokens) / seconds(theirs)])
    return at_least("prefill, 256 tokens", "tokens/s", mine, others, None)


def products(rounds: int) -> Iterator[Row]:
    """One thread, a matrix that fits no cache level but the last: 1536 outputs, 576 inputs."""
    kernels, weight = load(), torch.randn(1536, 576)
    packed, isa = kernels.pack(weight), kernels.isa
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for count in (1, 16):
        x = torch.randn(count, 576)
        work = 2.0 * count * weight.numel() * 1e-9

        def own(_: int, x: Tensor = x, work: float = work) -> float:
            return work / min(
                seconds(lambda: kernels.gemm(packed, *kernels.quantize(x, isa=isa), isa)) for _ in range(9)
            )

        def theirs(_: int, x: Tensor = x, work: float = work) -> float:
            return work / min(seconds(lambda: nnf.linear(x, weight)) for _ in range(9))

        mine, others = in_turn(rounds, [own, theirs])
        yield at_least(f"product, {count} rows", "GFLOP/s", mine, others, None)
    torch.set_num_threads(threads)


def distance(model: Any, decoder: FastDecoder, ids: list[int]) -> Row:
    """Mean KL divergence of our next-token distribution from fp32's."""
    tokens = ids[:KL_TOKENS]
    expected = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    found = Ours(decoder, 1).prefill(0, tokens, all_logits=True).double().log_softmax(-1)
    kl = float((expected.exp() * (expected - found)).sum(-1).mean())
    return bounded(f"KL to fp32, {KL_TOKENS} tokens", "nats", kl, KL_TARGET)


@torch.inference_mode()
def run(folder: Path, threads: int, quick: bool) -> Iterator[Row]:
    """All rows."""
    disable_progress_bar()
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    decoder, ids = fast_decoder(model, context_length=CONTEXT), Texts(folder).ids
    rounds, steps = (2, 8) if quick else (5, 24)
    yield distance(model, decoder, ids)
    for sequences in (1, 4, 16):
        yield decode(model, decoder, ids, sequences, steps, rounds)
    yield prefill(model, decoder, ids, rounds)
    yield from products(rounds)


def main() -> int:
    """See `bench.command`."""
    parser = command.parser("kernels", __doc__, "fewer rounds")
    parser.add_argument("--model", type=Path, help="folder of a model; by default the store's default model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    folder = options.model or _default_model()
    found = (row for row in run(folder, options.threads, options.quick) if options.only in row.case)
    return command.run("kernels", options, lambda _: found)


def _default_model() -> Path:
    store = Store(default_store_path())
    return store.materialize(ensure_default(store))


if __name__ == "__main__":
    sys.exit(main())
