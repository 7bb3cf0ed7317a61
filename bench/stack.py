"""The whole stack over HTTP with an echo worker, beside a bare uvicorn server and a bare `grpc.aio` stream.

    python -m bench.stack --json

etcd, scheduler, worker and gateway run as `llmos up` starts them; the load comes from a process of its own
(`sides/sse_load.py`), and the text of a sample of the answers is compared with the worker's tokens. All share the
machine's cores. The bare server (`sides/bare_sse.py`) sends one of our own events over and over, one at a time per
stream. Both sides take turns within each round.
"""

from __future__ import annotations

import statistics
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from bench import command
from bench.rows import Row, at_least, at_most, reported
from bench.service import percentile
from bench.sides.side import SideError
from bench.stack_sides import Fleet, bare_server, emitted_ns, fleet, grpc_hop, load
from worker.backends.echo import echo_token, prompt_digest

RATIO_AIM, TOKENS_AIM, HOPS_AIM, FLAT_AIM = 0.35, 15_000.0, 3.0, 0.9
STREAMS = 256
FLAT = (16, 64, 512)
"""Numbers of streams besides `STREAMS` at which throughput is to stay the same."""
LONG, SHORT = 2000, 16
"""Tokens of an answer."""
SHORT_STREAMS = 64
PROMPT = "The whole stack over HTTP, one event per token."
SHARE = 0.2
"""Of what the stack can carry, for latencies."""
PACE = 50.0
"""Tokens per second of a stream for latencies."""
ANSWER_S = 2.0
"""How long an answer takes then. The requests come evenly spread over it."""
SECONDS, QUICK_SECONDS, ROUNDS = 6.0, 4.0, 3
_WARM_S = 2.0


def saturate(
    port: int, streams: int, seconds: float, tokens: int = LONG, *, trace: bool = False, spread_s: float = 0.0
) -> Mapping[str, Any]:
    """Load a server with so many streams. Raises SideError."""
    body = {"model": "echo", "prompt": PROMPT, "max_tokens": tokens}
    found = load(port=port, body=body, streams=streams, warm_s=_WARM_S, seconds=seconds, trace=trace, spread_s=spread_s)
    if found["errors"]:
        raise SideError(f"the load met an error: {found['errors'][0]}")
    return found


def saturate_ours(port: int, streams: int, seconds: float, tokens: int = LONG, **options: Any) -> Mapping[str, Any]:
    """The same, and check the text of a sample of the answers."""
    found = saturate(port, streams, seconds, tokens, **options)
    digest = prompt_digest(list(PROMPT.encode()))
    for seed, text in found["samples"]:
        if text != "".join(chr(echo_token(digest, seed, 0, index)) for index in range(len(text))):
            raise SideError(f"the answer of seed {seed} has other text than the worker made")
    if not any(text for _, text in found["samples"]):
        raise SideError("no answer could be checked")
    return found


def rate(found: Mapping[str, Any]) -> float:
    """Events per second."""
    return float(found["events"] / found["seconds"])


def throughput(ours: Fleet, bare: int, seconds: float, rounds: int) -> Iterator[Row]:
    """Saturated with `STREAMS` streams."""
    mine, theirs = [], []
    spent: Counter[str] = Counter()
    tokens = 0.0
    for _ in range(rounds):
        before = ours.cpu_s()
        found = saturate_ours(ours.http_port, STREAMS, seconds)
        for kind, after in ours.cpu_s().items():
            spent[kind] += after - before.get(kind, 0.0)
        spent["load generator"] += found["cpu_s"]
        tokens += rate(found) * (seconds + _WARM_S)
        mine.append(rate(found))
        theirs.append(rate(saturate(bare, STREAMS, seconds)))
    case = f"{STREAMS} streams"
    yield at_least(f"{case}: events, bare uvicorn", "events/s", mine, theirs, RATIO_AIM)
    yield at_least(f"{case}: tokens", "tokens/s", mine, [TOKENS_AIM] * rounds, 1.0)
    for kind, cpu_s in spent.most_common():
        yield reported(f"{case}: processor time, {kind}", "us/token", cpu_s / tokens * 1e6)


def flatness(ours: int, seconds: float, rounds: int) -> Iterator[Row]:
    """Throughput by number of streams, the least beside the most."""
    found: dict[int, list[float]] = {streams: [] for streams in sorted((*FLAT, STREAMS))}
    for _ in range(rounds):
        for streams, rates in found.items():
            rates.append(rate(saturate_ours(ours, streams, seconds)))
    means = {streams: statistics.median(rates) for streams, rates in found.items()}
    for streams, mean in means.items():
        yield reported(f"{streams} streams: tokens, by number of streams", "tokens/s", mean)
    best, last = max(means.values()), means[max(means)]
    yield at_least(f"{max(means)} streams beside the best number", "tokens/s", [last], [best], FLAT_AIM)


def short(ours: int, bare: int, seconds: float, rounds: int) -> Iterator[Row]:
    """Requests for few tokens, one after the other."""
    mine, theirs = [], []
    for _ in range(rounds):
        mine.append(saturate_ours(ours, SHORT_STREAMS, seconds, SHORT))
        theirs.append(saturate(bare, SHORT_STREAMS, seconds, SHORT))
    per_s = [[found["requests"] / found["seconds"] for found in side] for side in (mine, theirs)]
    yield at_least(f"{SHORT} tokens, {SHORT_STREAMS} clients: requests, bare uvicorn", "requests/s", *per_s, None)


def latency(capacity: float, seconds: float) -> Iterator[Row]:
    """From the engine's emission of a token to its arrival at the client, at a fifth of the capacity."""
    streams = max(1, round(SHARE * capacity / PACE))
    with fleet("--echo-tokens-per-second", str(PACE)) as ours:
        found = saturate_ours(ours.http_port, streams, seconds, int(PACE * ANSWER_S), trace=True, spread_s=ANSWER_S)
        made = emitted_ns(ours.grpc_port, list(found["times_ns"]))
    ages = [(found["times_ns"][name][at] - times[at]) / 1e6 for name, times in made.items() for at in (0, 1)]
    if not ages:
        raise SideError("no trace says when its tokens were made")
    hops = grpc_hop(PACE, 40 * streams, seconds)
    case = f"{SHARE:.0%} load, {streams} streams at {PACE:g} tokens/s"
    way, hop = statistics.median(ages), statistics.median(hops)
    yield at_most(f"{case}: token's way p50, grpc.aio hop", "ms", [way], [hop], HOPS_AIM)
    yield reported(f"{case}: token's way p99, grpc.aio hop", "ms", percentile(ages, 0.99), percentile(hops, 0.99))
    yield reported(f"{case}: request to first token p50", "ms", statistics.median(found["first_ms"]))


def measure(options: Namespace) -> Iterator[Row]:
    """All rows that are asked for."""
    seconds, rounds = (QUICK_SECONDS, 1) if options.quick else (SECONDS, ROUNDS)
    with fleet() as ours:
        http = ours.http_port
        first = saturate_ours(http, STREAMS, QUICK_SECONDS)
        with bare_server(first["event"]) as bare:
            parts = (
                lambda: throughput(ours, bare, seconds, rounds),
                lambda: () if options.quick else flatness(http, seconds, 2),
                lambda: short(http, bare, seconds, rounds),
            )
            for part in parts:
                yield from part()
    yield from latency(rate(first), seconds)


def main() -> int:
    """See `bench.command`."""
    options = command.parser("stack", __doc__, "one round, and 256 streams only").parse_args()

    def chosen(versions: list[str]) -> Iterator[Row]:
        return (row for row in measure(options) if options.only in row.case)

    return command.run("stack", options, chosen)


if __name__ == "__main__":
    sys.exit(main())
