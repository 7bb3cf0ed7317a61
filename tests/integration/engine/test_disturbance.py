"""The exactness table on a tiny model: every kind of request, disturbed in every way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers

from bench.disturbance import DISTURBANCES, Bench
from bench.exactness import KINDS, Kind, measure, opened
from tests.fakes import json_tokens
from tests.fakes.json_tokens import END, SIZE
from tests.integration.engine.tiny import prompts

pytestmark = pytest.mark.torch

RUNS = 2


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = json_tokens.write(tmp_path_factory.mktemp("disturbed"))
    config = transformers.LlamaConfig(
        vocab_size=SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        eos_token_id=END,
    )
    torch.manual_seed(2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with opened(folder, "fp32") as bench:
        yield bench


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_disturbed_run_gives_what_it_gives_undisturbed(kind: Kind, bench: Bench) -> None:
    found = list(measure(bench, kind, lambda number, length: prompts([length], seed=number)[0], RUNS))
    assert [name for name, _, _ in found] == list(DISTURBANCES)
    assert all(exact == total >= 1 for _, exact, total in found)
