"""The torch backend under orders, at a pace that leaves time for faults."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from llmos.clock import SystemClock
from tests.fakes import json_tokens
from tests.faults.doubles.engine import STALE, Faulty
from worker.backend import Backend, StepResult
from worker.backends.torch import TorchBackend
from worker.engine import engine
from worker.engine.grammar.guard import Guard
from worker.engine.sampling import Pick, SamplingRow
from worker.fingerprint import torch_fingerprint

_sample = engine.sample


class FaultyTorch(Faulty, TorchBackend):
    """See `Faulty`. A step that computes takes `pace_s` at least."""

    stale_token = json_tokens.encode(chr(STALE))[0]
    pace_s = 0.0

    def step(self) -> StepResult:
        """See `Backend`."""
        begun = time.monotonic()
        result = super().step()
        if result.outputs:
            time.sleep(max(0.0, self.pace_s - (time.monotonic() - begun)))
        return result


def create(orders: Path, **options: Any) -> tuple[Backend, str]:
    """In the place of `worker.backends.create`."""

    def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[Pick | None]:
        return _sample(logits * math.nan if (orders / "nan").exists() else logits, rows)

    engine.sample = sample
    backend = FaultyTorch(threads=options["threads"], precision=options["precision"], guard=Guard(SystemClock()))
    backend.obey(orders)
    backend.pace_s = 1.0 / options["tokens_per_second"] if options["tokens_per_second"] else 0.0
    return backend, torch_fingerprint(precision=backend.precision, kernels=backend.kernels)
