"""Seconds of mixed load of which most is cancelled: nothing is left of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
import transformers

from bench.soak import MODEL, Soak, start
from llmos.clock import SystemClock
from tests.fakes import json_tokens
from tests.fakes.json_tokens import END, SIZE
from tests.integration.engine.tiny import prompts
from worker.backend import ModelSpec
from worker.backends.torch import TorchBackend
from worker.engine.engine import EngineOptions
from worker.engine.grammar.guard import Guard
from worker.engine.run import Run
from worker.engine.sequence import SequenceKV

pytestmark = pytest.mark.torch

STEPS = 150
BUDGET = 34 << 20


@pytest.fixture
def soak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Soak]:
    folder = json_tokens.write(tmp_path_factory.mktemp("soaked"))
    config = transformers.LlamaConfig(
        vocab_size=SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=END,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    guard, threads = Guard(SystemClock()), torch.get_num_threads()
    backend = TorchBackend(threads=1, precision="fp32", options=EngineOptions(max_running=24), guard=guard)
    yield start(
        backend, ModelSpec(MODEL, "1", folder), BUDGET, lambda seed, length: prompts([length], seed=seed)[0], seed=3
    )
    backend.unload(MODEL)
    guard.close()
    torch.set_num_threads(threads)


def left(kind: type) -> int:
    gc.collect()
    return sum(type(thing) is kind for thing in gc.get_objects())


def test_no_block_and_no_object_outlives_its_request(soak: Soak) -> None:
    before = left(Run), left(SequenceKV)
    for _ in range(STEPS):
        soak.step()
    assert soak.cancels > STEPS
    assert soak.finished > 5
    assert soak.line.failures == []
    assert soak.drain() == 0
    assert (left(Run), left(SequenceKV)) == before
