"""Minutes of mixed load of which most is cancelled: KV blocks return, and memory stays.

    python -m bench.soak --minutes 10

Commands go to the engine as in its process, as messages, and its frames are read back. Requests come in all kinds
(several choices, shared prompts, constraints, priorities, repeated text, resumed ones), and most are cancelled at a
random step: waiting, in their prefill or while they decode. The model is a small random one, unless one is named: what
leaks does not depend on its size, and there are more cancels in the same time. This process's memory is read all the
while. A line through it, after the first half of the time, gives the bytes leaked per 100,000 cancels and, by
Student's t over the medians of twelve parts, a bound that they stay below with 97.5 % confidence.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from bench import command
from bench.exactness import SCHEMA
from bench.rows import Row, bounded, reported
from bench.subject import Prompts, prompts_of, small_model
from gateway.text.prefix import prefix_hashes
from llmos.clock import SystemClock
from llmos.internal.v1 import request_pb2, work_pb2
from llmos.v1 import fleet_pb2, inference_pb2
from worker.backend import ModelSpec
from worker.backends.torch import TorchBackend
from worker.engine.engine import EngineOptions
from worker.engine.grammar.guard import Guard
from worker.engine_process import Engine

MODEL = "model"
_MEMORY, _SMALL_MEMORY = 460 << 20, 64 << 20
"""Bytes for a model of the default one's size and for the small one: blocks are scarce."""
LEAK_LIMIT = 4 << 20
"""Bytes per 100,000 cancels that the upper bound may reach."""
_CONCURRENT = 96
_CANCELS = 20
"""Most cancels per step."""
_PROMPTS = 40
_PARTS = 12
_SAMPLES = 500
_STUDENT_T = 2.228
"""97.5 % quantile for `_PARTS` - 2 degrees of freedom."""


@dataclass(slots=True)
class Line:
    """The engine's messages, read back as the RPC process does."""

    open: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)
    blocks: fleet_pb2.NodeModel = field(default_factory=fleet_pb2.NodeModel)
    _ended: dict[str, int] = field(default_factory=dict)

    def __call__(self, message: work_pb2.AttachResponse) -> None:
        """Implements `worker.engine_process.Transmit`."""
        frame = work_pb2.AttachResponse.FromString(message.SerializeToString()).frame
        for model in frame.models:
            self.blocks = model
        for failure in frame.failures:
            self.failures.append(f"{failure.code}: {failure.message}")
        for output in frame.outputs:
            if output.finish_reason and output.request_id in self.open:
                self._ended[output.request_id] = self._ended.get(output.request_id, 0) + 1
                if self._ended[output.request_id] == _choices(output.request_id):
                    self.forget(output.request_id)

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self.open.discard(request_id)
        self._ended.pop(request_id, None)


class Load:
    """Requests of all kinds, from a seed."""

    def __init__(self, text: Prompts, source: random.Random) -> None:
        self._text = text
        self._source = source
        self._numbers = itertools.count()

    def dispatch(self) -> work_pb2.Command:
        """The next request."""
        source, number = self._source, next(self._numbers)
        prompt = self._text(source.randrange(_PROMPTS), source.choice((8, 40, 130, 200, 300)))
        if source.random() < 0.2:
            prompt = prompt[:12] * 5
        choices = source.choice((1, 1, 1, 2, 4))
        request = request_pb2.Request(
            request_id=f"{number}/{choices}",
            model=MODEL,
            token_ids=prompt,
            prefix_hashes=prefix_hashes(prompt, model_version="1", tenant=f"tenant {number % 3}"),
            sampling=request_pb2.Sampling(
                temperature=source.choice((0.0, 0.8)),
                top_p=1.0,
                repetition_penalty=source.choice((1.0, 1.1)),
                seed=number,
            ),
            max_tokens=source.choice((1, 10, 60, 150)),
            choices=choices,
            priority=source.randrange(1, 4),  # type: ignore[arg-type]
        )
        if source.random() < 0.1:
            request.constraint.CopyFrom(inference_pb2.Constraint(json_schema=json.dumps(SCHEMA)))
        elif source.random() < 0.1:
            known = self._text(number, source.randrange(request.max_tokens))
            request.resume.append(request_pb2.ChoiceResume(choice=0, token_ids=known))
        return work_pb2.Command(dispatch=work_pb2.Dispatch(epoch=EPOCH, request=request))


EPOCH = request_pb2.Epoch(term=1, attempt=1)


def _choices(request_id: str) -> int:
    return int(request_id.split("/")[1])


@dataclass(slots=True)
class Soak:
    """An engine under load. `cancels` and memory are read by the caller."""

    engine: Engine
    line: Line
    load: Load
    source: random.Random
    cancels: int = 0
    finished: int = 0

    def step(self) -> None:
        """Keep many requests open, cancel some, compute one step."""
        commands: list[work_pb2.Command] = []
        for request_id in self.source.sample(sorted(self.line.open), k=min(len(self.line.open), _CANCELS)):
            if self.source.random() < 0.8:
                commands.append(_cancel(request_id))
                self.line.forget(request_id)
                self.cancels += 1
        while len(self.line.open) < _CONCURRENT:
            commands.append(self.load.dispatch())
            self.line.open.add(commands[-1].dispatch.request.request_id)
        admitted = len(self.line.open)
        self.engine.obey(commands)
        self.engine.step()
        self.finished += admitted - len(self.line.open)

    def drain(self) -> int:
        """Cancel all that is open. Returns the blocks that are then still in use."""
        self.engine.obey([_cancel(request_id) for request_id in list(self.line.open)])
        self.line.open.clear()
        while self.engine.busy:
            self.engine.step()
        self.engine.step()
        return int(self.line.blocks.total_blocks - self.line.blocks.free_blocks)


def _cancel(request_id: str) -> work_pb2.Command:
    return work_pb2.Command(cancel=work_pb2.CancelAttempt(request_id=request_id, epoch=EPOCH))


def start(backend: TorchBackend, spec: ModelSpec, memory_budget: int, text: Prompts, seed: int) -> Soak:
    """Load the model and lay out its blocks. Raises RuntimeError if that fails."""
    line = Line()
    engine = Engine(backend, {spec.name: spec}, line)  # type: ignore[arg-type]
    engine.obey([work_pb2.Command(load=work_pb2.LoadModel(model=spec.name, memory_budget_bytes=memory_budget))])
    engine.step()
    if not line.blocks.total_blocks:
        raise RuntimeError(f"the model was not loaded: {line.blocks.detail}")
    return Soak(engine, line, Load(text, random.Random(seed)), random.Random(seed + 1))


def leak(samples: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Bytes per 100,000 cancels and their upper bound, from (cancels, bytes) in order."""
    size = len(samples) // _PARTS
    parts = [samples[number * size : (number + 1) * size] for number in range(_PARTS)]
    cancels = [statistics.median(x for x, _ in part) for part in parts]
    memory = [statistics.median(y for _, y in part) for part in parts]
    slope, intercept = statistics.linear_regression(cancels, memory)
    rest = sum((y - slope * x - intercept) ** 2 for x, y in zip(cancels, memory, strict=True))
    spread = sum((x - statistics.mean(cancels)) ** 2 for x in cancels)
    error = math.sqrt(rest / (_PARTS - 2) / spread)
    return slope * 1e5, (slope + _STUDENT_T * error) * 1e5


def measure(soak: Soak, seconds: float) -> Iterator[Row]:
    """Soak, then say what is left."""
    process = psutil.Process()
    samples: list[tuple[int, int]] = []
    end = time.monotonic() + seconds
    following = end - 0.5 * seconds
    while (now := time.monotonic()) < end:
        soak.step()
        if now > following:
            samples.append((soak.cancels, process.memory_info().rss))
            following += seconds / _SAMPLES  # few, as they take memory too
    yield _none(f"KV blocks in use after the load, of {soak.line.blocks.total_blocks}", "blocks", soak.drain())
    yield _none("requests that failed", "requests", len(soak.line.failures))
    yield reported("requests cancelled", "requests", soak.cancels)
    yield reported("requests finished", "requests", soak.finished)
    slope, bound = leak(samples)
    yield reported("leaked per 100,000 cancels", "bytes", slope)
    yield bounded("leaked per 100,000 cancels, upper bound", "bytes", bound, LEAK_LIMIT)


def _none(case: str, unit: str, count: int) -> Row:
    return Row(case, count, None, unit, None, 0.0, count == 0)


def _run(folder: Path | None, seconds: float) -> Iterator[Row]:
    guard = Guard(SystemClock())
    options = EngineOptions(max_running=32)
    backend = TorchBackend(threads=torch.get_num_threads(), precision="int8", options=options, guard=guard)
    with tempfile.TemporaryDirectory() as made:
        try:
            used = folder or small_model(Path(made))
            memory = _MEMORY if folder else _SMALL_MEMORY
            soak = start(backend, ModelSpec(MODEL, "1", used), memory, prompts_of(used), seed=1)
            yield from measure(soak, seconds)
        finally:
            backend.unload(MODEL)
            guard.close()


def main() -> int:
    """See `bench.command`."""
    parser = command.parser("soak", __doc__, "half a minute, which says nothing of slow leaks")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--model", type=Path, help="folder of a model; by default a small random one")
    options: Any = parser.parse_args()
    seconds = 30.0 if options.quick else 60 * options.minutes
    return command.run("soak", options, lambda _: _run(options.model, seconds))


if __name__ == "__main__":
    sys.exit(main())
