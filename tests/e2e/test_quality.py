"""The real model in its default precision: how far from fp32, and the same on both paths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmos.store import Store, ensure_default
from llmos.store.planning import ensure_plan
from llmos.store.precision import PlanRecord
from tests.e2e.default_model import default_model
from worker import kernels
from worker.engine import model as general
from worker.engine.loading import load
from worker.quality.corpus import windows
from worker.quality.distance import distance, of_decoder, of_transformers

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(600)]
CPU = torch.device("cpu")
KL_BETWEEN_PATHS = 1e-5
"""Nats per token: rounding of keys and values to fp16 on one path, and other orders of summation."""


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    if not kernels.available():
        pytest.skip(kernels.reason())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def record() -> PlanRecord:
    """Measured at the first run on this machine, then in the user's store."""
    store = Store()
    found = ensure_plan(store, ensure_default(store))
    assert found is not None
    return found


def test_the_default_plan_is_int8_and_within_the_bound(record: PlanRecord) -> None:
    assert {kind for _, kind in record.plan.matrices()} == {"int8"}
    assert record.measured is not None
    assert record.measured.kl <= 0.005
    assert abs(record.measured.perplexity_ratio - 1) <= 0.005


def unseen(folder: Path, tokens: int) -> list[int]:
    """A text that the plan was not measured on."""
    tokenizer = folder / "tokenizer.json"
    found = windows(tokenizer, 4)[1]
    assert found not in windows(tokenizer)
    return found[:tokens]


@pytest.mark.long
def test_on_other_text_the_default_stays_close_to_fp32(record: PlanRecord) -> None:
    folder = default_model()[1]
    reference = general.read(folder, CPU)
    reference.set_attn_implementation("sdpa")
    served = load(folder, CPU, plan=record.plan, kernels=True)
    found = distance(of_transformers(reference), of_decoder(served), [unseen(folder, 192)])
    assert 0 < found.kl <= 0.005
    assert found.agreement >= 0.94


@pytest.mark.long
def test_both_paths_agree_on_the_default_plan(record: PlanRecord) -> None:
    folder = default_model()[1]
    by_kernels = load(folder, CPU, plan=record.plan, kernels=True)
    by_torch = load(folder, CPU, precision="int8")
    found = distance(of_decoder(by_torch), of_decoder(by_kernels), [unseen(folder, 48)])
    assert found.kl <= KL_BETWEEN_PATHS
