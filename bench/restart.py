"""How long after its engine process was killed a worker serves again.

    python -m bench.restart

A worker's link to its engine process, with a spare engine as by default; the process is killed with SIGKILL while it
decodes, and the same request is asked again until its first new token comes: detection, the spare, loading the model.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench import command
from bench.rows import Row, bounded, reported
from bench.subject import default_model, plan_of
from llmos.clock import SystemClock
from llmos.internal.v1 import request_pb2, work_pb2
from worker.engine_link import EngineLink
from worker.engine_process import EngineModel, EngineSetup

MODEL = "model"
LIMIT_S = 5.0
_MEMORY = 1 << 30
_ROUNDS = 3
_PATIENCE_S = 120.0


class Asker:
    """Implements `EngineListener`: loads the model and asks as soon as an engine is ready."""

    def __init__(self) -> None:
        self.link: EngineLink | None = None
        self.token = asyncio.Event()
        self._attempts = 0

    def engine_ready(self, report: work_pb2.WorkerReport) -> None:
        """See `EngineListener`."""
        assert self.link is not None
        self._attempts += 1
        request = request_pb2.Request(
            request_id="a", model=MODEL, token_ids=[1, 2, 3], max_tokens=4000, choices=1, ignore_eos=True
        )
        request.sampling.CopyFrom(request_pb2.Sampling(top_p=1.0, repetition_penalty=1.0))
        dispatch = work_pb2.Dispatch(epoch=request_pb2.Epoch(term=1, attempt=self._attempts), request=request)
        load = work_pb2.LoadModel(model=MODEL, memory_budget_bytes=_MEMORY)
        self.link.send([work_pb2.Command(load=load), work_pb2.Command(dispatch=dispatch)])

    def engine_frame(self, frame: work_pb2.WorkFrame) -> None:
        """See `EngineListener`."""
        if frame.failures:
            raise RuntimeError(frame.failures[0].message)
        if frame.outputs:
            self.token.set()

    def engine_lost(self, reason: str) -> None:
        """See `EngineListener`."""
        self.token.clear()


async def times(setup: EngineSetup, *, spare: bool, rounds: int) -> list[float]:
    """Seconds from the kill to the first token, of several kills in a row."""
    asker = Asker()
    link = EngineLink(setup, asker, clock=SystemClock(), rng=random.Random(1), spare_after_s=0.0 if spare else None)
    asker.link = link
    running = asyncio.create_task(link.run())
    found = []
    try:
        async with asyncio.timeout(_PATIENCE_S * (rounds + 1)):
            for _ in range(rounds):
                await asker.token.wait()
                while spare and link.spare_pid is None:  # noqa: ASYNC110 - another process decides
                    await asyncio.sleep(0.05)
                assert link.pid is not None
                begun = time.perf_counter()
                os.kill(link.pid, signal.SIGKILL)
                asker.token.clear()
                while link.restarts <= len(found):  # noqa: ASYNC110 - pieces of the old engine may still come
                    await asyncio.sleep(0.001)
                await asker.token.wait()
                found.append(time.perf_counter() - begun)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await link.close()
    return found


def measure(folder: Path, rounds: int) -> Iterator[Row]:
    """With a spare, as by default, and without."""
    model = EngineModel(name=MODEL, version="1", folder=str(folder), plan=plan_of(folder))
    setup = EngineSetup(
        backend="torch", threads=torch.get_num_threads(), tokens_per_second=0.0, models=(model,), log_level="warning"
    )
    found = asyncio.run(times(setup, spare=True, rounds=rounds))
    yield bounded("engine killed: serving again, at worst", "s", max(found), LIMIT_S)
    yield reported("the same without a spare engine", "s", max(asyncio.run(times(setup, spare=False, rounds=1))))


def main() -> int:
    """See `bench.command`."""
    parser = command.parser("restart", __doc__, "one kill")
    parser.add_argument("--model", type=Path, help="folder of a model in the store; by default the default model")
    options = parser.parse_args()
    rounds = 1 if options.quick else _ROUNDS
    return command.run("restart", options, lambda _: measure(options.model or default_model(), rounds))


if __name__ == "__main__":
    sys.exit(main())
