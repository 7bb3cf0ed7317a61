"""The leading scheduler is killed, or frozen and thawed, under streams: who loses what, and how soon work goes on.

    python -m bench.failover

A fleet of processes: etcd, two schedulers, two gateways, two workers with the echo backend, whose every character is
known beforehand. In each round the leader is hit in the middle of the streams; a new request is asked for again and
again until it is answered.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from bench import command
from bench.rows import Row, bounded, reported
from tests.fakes.fleet import Fleet, Process, running_fleet, wait_for
from tests.fakes.streams import Streamed, disturbed, first_answer_s

STREAMS = 64
TOKENS = 300
SPEED = "25"
LIMIT_S = 5.0
"""From the fault to the first answer to a new request."""
FAULTS = {"frozen and thawed": signal.SIGSTOP, "killed": signal.SIGKILL}
_LEADER = "/llmos/v1/leader"


def leader(fleet: Fleet) -> Process:
    """The scheduler that etcd names."""

    def named() -> Process | None:
        shown = fleet.etcd.ctl("get", _LEADER, "--print-value-only")
        leading = json.loads(shown)["scheduler_id"] if shown.strip() else ""
        return next((one for one in fleet.processes if one.id == leading), None)

    found = wait_for(named, "a leader")
    assert found is not None
    return found


def hit(fleet: Fleet, number: signal.Signals, streams: int, tokens: int) -> tuple[Counter[str], float, float]:
    """One fault. Returns verdicts of the streams, seconds to a new answer, the longest pause of any stream."""
    urls = [f"http://127.0.0.1:{gateway.ready['http_port']}" for gateway in fleet.gateways()]
    running = [Streamed(f"{number.name} {index}", tokens) for index in range(streams)]
    waited: list[float] = []

    async def disturb(reached: Callable[[int], Awaitable[None]]) -> None:
        await reached(tokens // 10)
        leading = leader(fleet)
        leading.signal(number)
        waited.append(await first_answer_s(urls))
        if number == signal.SIGSTOP:
            leading.signal(signal.SIGCONT)

    verdicts = asyncio.run(disturbed(urls, running, disturb))
    pauses = [
        later - earlier
        for stream in running
        for earlier, later in zip(stream.times_s, stream.times_s[1:], strict=False)
    ]
    return verdicts, waited[0], max(pauses, default=0.0)


def measure(streams: int, tokens: int, only: str) -> Iterator[Row]:
    """A leader that is frozen and thawed, then one that is killed."""
    with tempfile.TemporaryDirectory() as folder, running_fleet(Path(folder)) as fleet:
        for _ in range(2):
            fleet.scheduler()
        for _ in range(2):
            fleet.worker("--backend", "echo", "--echo-tokens-per-second", SPEED)
        for _ in range(2):
            fleet.gateway()
        fleet.wait_ready()
        for name, number in FAULTS.items():
            if only not in f"leader {name}":
                continue
            verdicts, wait_s, pause_s = hit(fleet, number, streams, tokens)
            yield bounded(f"leader {name}: a new request is answered", "s", wait_s, LIMIT_S)
            yield reported(f"leader {name}: longest pause of {streams} streams", "s", pause_s)
            broken = streams - verdicts["whole"]
            case = f"leader {name}: streams lost, repeated or changed"
            yield Row(case, float(broken), 0.0, "streams", None, None, broken == 0)


def main() -> int:
    """See `bench.command`."""
    options = command.parser("failover", __doc__, "8 short streams").parse_args()
    streams, tokens = (8, 120) if options.quick else (STREAMS, TOKENS)
    return command.run("failover", options, lambda _: measure(streams, tokens, options.only))


if __name__ == "__main__":
    sys.exit(main())
