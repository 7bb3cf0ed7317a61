"""llmos's engine against llama.cpp, vLLM and transformers: decode, prefill, and the share of the machine's limits.

    python -m bench.engine --quick --json

All sides run the same model, prompts and output length with the same threads, in processes of their own, in turn for
several rounds; a row has the medians, and the median and spread of the rounds' ratios. `make peers` builds the peers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from bench import command, switches
from bench.corpus import Texts
from bench.divergence import qualities
from bench.limits import BYTES_PER_WEIGHT, Meter, matrices
from bench.peers.places import GEMMA3, SMOLLM2, Model
from bench.rows import Row, at_least, in_turn, reported
from bench.sides.side import Side
from bench.sides.start import EVERYBODY, LLAMA_Q8, THREADS, TRANSFORMERS, VLLM, Sides, folder, peer, require
from worker.config import WorkerConfig

PROMPT = 16
"""Tokens of the short prompts before decoding."""
PREFILL = 1024
ROUNDS, QUICK_ROUNDS = 5, 3
SEQUENCES = (1, 4, 16, 32)
STEPS = {1: 64, 4: 32, 16: 16, 32: 12}
KL_TOKENS = 256
LIMIT_SHARE = 0.75
Measure = Callable[[Side, Texts, int], float]


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure on every side."""

    name: str
    measure: Measure
    """Given a side, texts in its tokens and the number of the round; higher is better."""
    aims: Mapping[str, float]
    """Peer to the ratio that is aimed at; peers without one are reported only."""


def decode(sequences: int) -> Measure:
    """Tokens per second of all sequences together, greedy, from short prompts."""

    def measure(one: Side, texts: Texts, number: int) -> float:
        del number
        return one.decode(texts.windows(sequences, PROMPT), STEPS[sequences])

    return measure


def prefill(one: Side, texts: Texts, number: int) -> float:
    """Prompt tokens per second; a prompt of its own for each round, so that no cache has it."""
    return one.prefill(texts.windows(16, PREFILL)[number % 16])


def cases(aims: Mapping[int, Mapping[str, float]], prefill_aims: Mapping[str, float]) -> list[Case]:
    """Decode at each number of sequences, and prefill."""
    decoding = [Case(f"decode, {n} sequence{'s' * (n > 1)}", decode(n), aims.get(n, {})) for n in SEQUENCES]
    return [*decoding, Case(f"prefill, {PREFILL} tokens", prefill, prefill_aims)]


SMOLLM2_CASES = cases(
    {1: {LLAMA_Q8: 1.5}, 4: {LLAMA_Q8: 2.5}, 16: {LLAMA_Q8: 2.5, VLLM: 5.0}, 32: {LLAMA_Q8: 2.5}}, {LLAMA_Q8: 2.0}
)
GEMMA3_CASES = cases({1: {LLAMA_Q8: 1.2}, 4: {LLAMA_Q8: 2.0}, 16: {LLAMA_Q8: 2.0}, 32: {LLAMA_Q8: 2.0}}, {})


def compare(sides: Sides, wanted: Sequence[Case], rounds: int) -> Iterator[tuple[Case, list[float], list[Row]]]:
    """Each case with our rounds and its rows, one per peer."""
    texts, everyone = Texts(sides.folder), [sides.ours, *sides.peers.values()]
    for one in everyone:
        warm_up(one, texts)
    for case in wanted:
        ours, *theirs = in_turn(rounds, [partial(case.measure, one, texts) for one in everyone])
        name = f"{sides.model.label}: {case.name}"
        peers = zip(sides.peers, theirs, strict=True)
        yield case, ours, [at_least(f"{name}, {p}", "tokens/s", ours, found, case.aims.get(p)) for p, found in peers]


def warm_up(one: Side, texts: Texts) -> None:
    """What is done at first use only is not measured."""
    one.decode(texts.windows(max(SEQUENCES), PROMPT), 4)
    one.prefill(texts.windows(1, PREFILL // 4)[0])


def divergences(sides: Sides) -> Iterator[Row]:
    """Each side's mean KL divergence from transformers' fp32, on few tokens; `bench.quality` takes more."""
    texts = Texts(sides.folder).windows(1, KL_TOKENS)
    names = [name for name in sides.peers if name != TRANSFORMERS]
    with peer(TRANSFORMERS, sides.model) as reference:
        mine, *theirs = qualities(reference, [sides.ours, *(sides.peers[name] for name in names)], texts)
    for name, found in zip(names, theirs, strict=True):
        yield reported(f"{sides.model.label}: mean KL to fp32, {name}", "nats", mine.kl, found.kl)


def shares(sides: Sides, speeds: Mapping[str, list[float]]) -> Iterator[Row]:
    """Our speed to what memory (one sequence) and integer units (32 sequences) allow at most.

    The weights are all that is counted, read once per step and multiplied once per token; KV and attention come on top.
    """
    limits, counts, kinds = Meter().measure(THREADS), matrices(sides.folder), sides.ours.about["kinds"]
    weights = sum(counts.values())
    size = sum(count * BYTES_PER_WEIGHT[kinds.get(name, kinds["head"])] for name, count in counts.items())
    bounds = (
        ("decode, 1 sequence", "memory reads", limits.read_bytes / size, LIMIT_SHARE),
        ("decode, 32 sequences", "16-bit multiply-adds", limits.int16 / weights, LIMIT_SHARE),
        ("decode, 32 sequences", "8-bit multiply-adds", limits.int8 / weights, None),
    )
    for case, what, bound, target in bounds:
        if case in speeds:
            name = f"{sides.model.label}: {case}, limit of {what}"
            yield at_least(name, "tokens/s", speeds[case], [bound] * len(speeds[case]), target)


def measure(quick: bool, peers: Sequence[str], only: str, precision: str, versions: list[str]) -> Iterator[Row]:
    """All rows."""
    models = [(SMOLLM2, SMOLLM2_CASES, peers)]
    if not quick:
        models.append((GEMMA3, GEMMA3_CASES, [peer for peer in peers if peer == LLAMA_Q8]))
    models = [(model, some, names) for model, every, names in models if (some := _named(model, every, only)) and names]
    for model, _, names in models:
        require([model], names)
    for model, some, names in models:
        with Sides(model, names, precision) as sides:
            versions.extend(sides.versions)
            speeds: dict[str, list[float]] = {}
            for case, ours, found in compare(sides, some, QUICK_ROUNDS if quick else ROUNDS):
                speeds[case.name] = ours
                yield from found
            if not quick:
                yield from shares(sides, speeds)
                yield from divergences(sides)
    if not quick:
        yield from switches.rows(SMOLLM2.label, folder(SMOLLM2), precision, ROUNDS, only)


def _named(model: Model, every: Iterable[Case], only: str) -> list[Case]:
    return [case for case in every if only in f"{model.label}: {case.name}"]


def main() -> int:
    """See `bench.command`."""
    parser = command.parser("engine", __doc__, "decode and prefill against llama.cpp Q8_0 only, in less than a minute")
    parser.add_argument("--peers", help=f"comma-separated, of: {', '.join(EVERYBODY)}")
    parser.add_argument("--precision", default=WorkerConfig().precision, help="ours; by default the worker's")
    options = parser.parse_args()
    peers = options.peers.split(",") if options.peers else [LLAMA_Q8] if options.quick else list(EVERYBODY)
    if unknown := set(peers) - set(EVERYBODY):
        parser.error(f"unknown peer: {', '.join(unknown)}")
    return command.run(
        "engine", options, lambda versions: measure(options.quick, peers, options.only, options.precision, versions)
    )


if __name__ == "__main__":
    sys.exit(main())
