"""A served mix through each one's own HTTP server: llmos's whole fleet, llama.cpp's llama-server, vLLM's server.

    python -m bench.serving --json

First llama.cpp's server is saturated, which says what it can carry. Then each server, alone on the machine, is
saturated and gets the same requests at three absolute rates: Poisson arrivals at a half, four fifths and six fifths of
what llama.cpp can carry; prompts of 32 to 1,024 tokens, outputs of 16 to 256, sampled, streamed. `--quick`: against
llama.cpp only, nobody saturated, one request every two seconds.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from bench import command, mix
from bench.client import Target, play, saturate
from bench.corpus import Texts
from bench.peers.places import SMOLLM2, Model
from bench.rows import Row, at_least, at_most, reported
from bench.servers import LLAMA, OURS, PEERS, SLOTS, ServerError, require, serving
from bench.service import Service, service
from bench.sides.start import folder

SHARES = (0.5, 0.8, 1.2)
AIMED = 0.8
"""The share of llama.cpp's capacity at which the gap is aimed at."""
GAP_AIM, GOODPUT_AIM = 0.7, 1.2
SEED = 20


QUICK_RATE = 0.5
"""Requests per second."""
SATURATED_S, RATED_S, QUICK_S = 60.0, 60.0, 12.0
"""How long is measured; the first third of the time when saturated is not counted."""
PATIENCE_S, QUICK_PATIENCE_S = 30.0, 5.0
"""For what still runs when the last request has come."""


class Prompts:
    """Prompts of the mix as text in a model's tokens."""

    def __init__(self, model: Model) -> None:
        files = folder(model)
        self._ids = Texts(files).ids
        self._tokenizer = Tokenizer.from_file(str(files / "tokenizer.json"))
        self.tokens = len(self._ids)

    def text(self, request: mix.Request) -> str:
        """Of one request."""
        found: str = self._tokenizer.decode(self._ids[request.first : request.first + request.prompt_tokens])
        return found


def saturated(target: Target, prompts: Prompts, seconds: float = SATURATED_S) -> Service:
    """As many clients as there are slots, without a pause."""
    work = ((prompts.text(one), one.output_tokens, one.seed) for one in mix.requests(prompts.tokens, SEED))
    start = time.perf_counter()
    traces = asyncio.run(saturate(target, work, SLOTS, seconds))
    _check(traces[0].error)
    return service(traces, start + seconds / 3, start + seconds)


def rated(
    target: Target, prompts: Prompts, rate: float, seconds: float = RATED_S, patience_s: float = PATIENCE_S
) -> Service:
    """Poisson arrivals."""
    due = mix.arrivals(rate, seconds, prompts.tokens, SEED + 1)
    texts = [prompts.text(arrival.request) for arrival in due]
    start = time.perf_counter()
    traces = asyncio.run(play(target, due, texts, patience_s))
    _check(traces[0].error)
    return service(traces, start, max([start + seconds, *(trace.times_s[-1] for trace in traces if trace.times_s)]))


def _check(error: str) -> None:
    """A server that refuses even the first request is not slow, but asked wrongly."""
    if error:
        raise ServerError(f"a request was refused: {error[:300]}")


@dataclass(frozen=True, slots=True)
class Result:
    """Of one server."""

    full: Service
    """Saturated."""
    rates: Mapping[float, Service]
    """By share of llama.cpp's capacity."""


def run(name: str, model: Model, capacity: float) -> tuple[float, Result]:
    """Measure one server. `capacity` in requests per second; 0: this server's own, which is returned."""
    prompts = Prompts(model)
    with serving(name, model) as target:
        full = saturated(target, prompts)
        carried = capacity or full.throughput / mix.mean_output_tokens()
        if not carried:
            raise ServerError(f"{name} put out no token in {SATURATED_S:.0f} s under load")
        return carried, Result(full, {share: rated(target, prompts, share * carried) for share in SHARES})


def compare(peer: str, capacity: float, ours: Result, theirs: Result) -> Iterator[Row]:
    """Rows of one peer."""
    yield at_least(f"saturated: goodput, {peer}", "tokens/s", [ours.full.goodput], [theirs.full.goodput], GOODPUT_AIM)
    for share, mine in ours.rates.items():
        case = f"{share * capacity:.2f} requests/s ({share:.0%})"
        yield from at_rate(case, peer, mine, theirs.rates[share], GAP_AIM if share == AIMED else None)


def at_rate(case: str, peer: str, ours: Service, theirs: Service, gap_aim: float | None) -> Iterator[Row]:
    """Rows of one rate. The ratio of `gap p99` is what is aimed at."""
    for name in ("ttft_p50", "ttft_p99", "gap_p50", "gap_p99"):
        words = name.replace("ttft_", "TTFT ").replace("gap_", "gap ")
        aim = gap_aim if name == "gap_p99" else None
        yield at_most(f"{case}: {words}, {peer}", "ms", [getattr(ours, name)], [getattr(theirs, name)], aim)
    yield at_least(f"{case}: goodput, {peer}", "tokens/s", [ours.goodput], [theirs.goodput], None)
    yield reported(f"{case}: failed, {peer}", "requests", ours.failed, theirs.failed)


def measure_quickly() -> Iterator[Row]:
    """Both at one rate that either can carry."""
    require(SMOLLM2, [LLAMA])
    prompts, found = Prompts(SMOLLM2), {}
    for name in (OURS, LLAMA):
        with serving(name, SMOLLM2) as target:
            found[name] = rated(target, prompts, QUICK_RATE, QUICK_S, QUICK_PATIENCE_S)
    yield from at_rate(f"{QUICK_RATE:.2f} requests/s", LLAMA, found[OURS], found[LLAMA], None)


def measure(peers: Sequence[str], versions: list[str]) -> Iterator[Row]:
    """All rows. llama.cpp's server goes first whether or not it is compared with: the rates come from it."""
    require(SMOLLM2, [LLAMA, *peers])
    capacity, first = run(LLAMA, SMOLLM2, 0.0)
    versions.append(f"llama-server carries {capacity:.2f} requests/s")
    _, ours = run(OURS, SMOLLM2, capacity)
    for peer in peers:
        theirs = first if peer == LLAMA else run(peer, SMOLLM2, capacity)[1]
        yield from compare(peer, capacity, ours, theirs)


def main() -> int:
    """See `bench.command`."""
    parser = command.parser("serving", __doc__, "llama.cpp at one rate, in less than a minute on a quiet machine")
    parser.add_argument("--peers", help=f"comma-separated, of: {', '.join(PEERS)}")
    options = parser.parse_args()
    peers = options.peers.split(",") if options.peers else list(PEERS)
    if unknown := set(peers) - set(PEERS):
        parser.error(f"unknown peer: {', '.join(unknown)}")

    def chosen(versions: list[str]) -> Iterator[Row]:
        every = measure_quickly() if options.quick else measure(peers, versions)
        return (row for row in every if options.only in row.case)

    return command.run("serving", options, chosen)


if __name__ == "__main__":
    sys.exit(main())
