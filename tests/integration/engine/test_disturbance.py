"""The exactness table on a tiny model: every kind of request, disturbed in every way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.disturbance import DISTURBANCES, Bench
from bench.exactness import KINDS, LORA, Kind, measure, random_adapter
from tests.integration.engine.tiny import prompts
from worker.engine.device import select_device
from worker.engine.loading import load

pytestmark = pytest.mark.torch

RUNS = 2


@pytest.fixture(scope="module")
def bench(written: Callable[[str], tuple[Path, Any]]) -> Bench:
    decoder = load(written("llama")[0], select_device("cpu"))
    return Bench(decoder, {LORA: random_adapter(decoder, hidden=48)})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_disturbed_run_gives_what_it_gives_undisturbed(kind: Kind, bench: Bench) -> None:
    found = list(measure(bench, kind, lambda number, length: prompts([length], seed=number)[0], RUNS))
    assert [name for name, _, _ in found] == list(DISTURBANCES)
    assert all(exact == total >= 1 for _, exact, total in found)
