"""A served mix through each one's own HTTP server: llmos's whole fleet, llama.cpp's llama-server, vLLM's server.

    python -m bench.serving --json

First llama.cpp's server is saturated, which says what it can carry. Then each server, alone on the machine, is
saturated and gets the same requests at three absolute rates: Poisson arrivals at a half, four fifths and six fifths of
what llama.cpp can carry; prompts of 32 to 1,024 tokens, outputs of 16 to 256, sampled, streamed. `--quick`: llama.cpp
only, at four fifths only, a few seconds.
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


@dataclass(frozen=True, slots=True)
class Lengths:
    """Seconds."""

    saturated: float
    """Of which the first third is not counted."""
    rated: float
    patience: float
    """For what still runs when the last request has come."""


FULL, QUICK = Lengths(60.0, 60.0, 30.0), Lengths(9.0, 10.0, 4.0)


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


def saturated(target: Target, prompts: Prompts, seconds: float) -> Service:
    """As many clients as there are slots, without a pause."""
    work = ((prompts.text(one), one.output_tokens, one.seed) for one in mix.requests(prompts.tokens, SEED))
    start = time.perf_counter()
    traces = asyncio.run(saturate(target, work, SLOTS, seconds))
    _check(traces[0].error)
    return service(traces, start + seconds / 3, start + seconds)


def rated(target: Target, prompts: Prompts, rate: float, lengths: Lengths) -> Service:
    """Poisson arrivals."""
    due = mix.arrivals(rate, lengths.rated, prompts.tokens, SEED + 1)
    texts = [prompts.text(arrival.request) for arrival in due]
    start = time.perf_counter()
    traces = asyncio.run(play(target, due, texts, lengths.patience))
    _check(traces[0].error)
    return service(
        traces, start, max([start + lengths.rated, *(trace.times_s[-1] for trace in traces if trace.times_s)])
    )


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


def run(name: str, model: Model, capacity: float, shares: Sequence[float], lengths: Lengths) -> tuple[float, Result]:
    """Measure one server. `capacity` in requests per second; 0: this server's own, which is returned."""
    prompts = Prompts(model)
    with serving(name, model) as target:
        full = saturated(target, prompts, lengths.saturated)
        carried = capacity or full.throughput / mix.mean_output_tokens()
        return carried, Result(full, {share: rated(target, prompts, share * carried, lengths) for share in shares})


def compare(peer: str, capacity: float, ours: Result, theirs: Result) -> Iterator[Row]:
    """Rows of one peer."""
    yield at_least(f"saturated: goodput, {peer}", "tokens/s", [ours.full.goodput], [theirs.full.goodput], GOODPUT_AIM)
    for share, mine in ours.rates.items():
        other = theirs.rates[share]
        case = f"{share * capacity:.2f} requests/s ({share:.0%}): "
        for what in ("ttft_p50", "ttft_p99", "gap_p50", "gap_p99"):
            aim = GAP_AIM if (what, share) == ("gap_p99", AIMED) else None
            words = what.replace("ttft_", "TTFT ").replace("gap_", "gap ")
            yield at_most(f"{case}{words}, {peer}", "ms", [getattr(mine, what)], [getattr(other, what)], aim)
        yield at_least(f"{case}goodput, {peer}", "tokens/s", [mine.goodput], [other.goodput], None)
        yield reported(f"{case}failed, {peer}", "requests", mine.failed, other.failed)


def measure(quick: bool, peers: Sequence[str], versions: list[str]) -> Iterator[Row]:
    """All rows. llama.cpp's server goes first whether or not it is compared with: the rates come from it."""
    lengths, shares = (QUICK, (AIMED,)) if quick else (FULL, SHARES)
    require(SMOLLM2, [LLAMA, *peers])
    capacity, first = run(LLAMA, SMOLLM2, 0.0, shares, lengths)
    versions.append(f"llama-server carries {capacity:.2f} requests/s")
    _, ours = run(OURS, SMOLLM2, capacity, shares, lengths)
    for peer in peers:
        theirs = first if peer == LLAMA else run(peer, SMOLLM2, capacity, shares, lengths)[1]
        yield from compare(peer, capacity, ours, theirs)


def main() -> int:
    """See `bench.command`."""
    parser = command.parser("serving", __doc__, "llama.cpp at one rate, in less than a minute")
    parser.add_argument("--peers", help=f"comma-separated, of: {', '.join(PEERS)}")
    options = parser.parse_args()
    peers = options.peers.split(",") if options.peers else [LLAMA] if options.quick else list(PEERS)
    if unknown := set(peers) - set(PEERS):
        parser.error(f"unknown peer: {', '.join(unknown)}")
    return command.run(
        "serving",
        options,
        lambda versions: (row for row in measure(options.quick, peers, versions) if options.only in row.case),
    )


if __name__ == "__main__":
    sys.exit(main())
