"""What the kernels must refuse before they touch memory, threads, fork and exit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmos.errors import UnsupportedFeature
from tests.integration.engine_fast import tiny
from tests.integration.engine_fast.conftest import Packed
from worker import kernels
from worker.engine.attention import KVRow
from worker.engine.fast import FastRows, fast_decoder, why_not


@pytest.mark.parametrize(
    ("token", "position", "block", "wanted", "message"),
    [
        (tiny.VOCABULARY, 0, 0, 0, "token"),
        (-1, 0, 0, 0, "token"),
        (0, -1, 0, 0, "position"),
        (0, 64, 0, 0, "position"),
        (0, tiny.CONTEXT, 0, 0, "position"),
        (0, 0, 2, 0, "block"),
        (0, 0, -1, 0, "block"),
        (0, 0, 0, 1, "row"),
        (0, 0, 0, -1, "row"),
    ],
)
def test_what_is_out_of_range_is_refused_and_nothing_is_written(
    packed: Packed, token: int, position: int, block: int, wanted: int, message: str
) -> None:
    decoder = packed("llama")
    pool = decoder.open_pool(2)
    for tensor in (*pool._keys, *pool._values):
        tensor.fill_(7.0)
    rows = FastRows(pool, [KVRow(pool.slots([block]), 1)])
    with pytest.raises(ValueError, match=message):
        decoder.forward([token], [position], rows, [wanted])
    assert all((tensor == 7.0).all() for tensor in (*pool._keys, *pool._values))


def test_rows_that_differ_in_number_are_refused(packed: Packed) -> None:
    decoder = packed("llama")
    pool = decoder.open_pool(1)
    with pytest.raises(ValueError, match="number"):
        decoder.forward([1, 2], [0, 1], FastRows(pool, [KVRow(pool.slots([0]), 1)]), [0])


def test_the_pool_of_another_model_is_refused(packed: Packed) -> None:
    decoder = packed("llama")
    for other in (packed("qwen3").open_pool(1), packed("llama", torch.float32).open_pool(1)):
        with pytest.raises(ValueError, match="another model"):
            decoder.forward([1], [0], FastRows(other, [KVRow(other.slots([0]), 1)]), [0])


def test_calls_from_several_threads_take_turns(packed: Packed) -> None:
    kernels.load().set_threads(2)
    text = tiny.text(50)
    families = ("llama", "qwen3", "llama", "gemma3")
    expected = {family: tiny.prefill(packed(family), packed(family).open_pool(1), [0], text) for family in families}
    wrong: list[str] = []

    def work(family: str) -> None:
        runs = (tiny.prefill(packed(family), packed(family).open_pool(1), [0], text) for _ in range(10))
        wrong.extend(family for run in runs if not torch.equal(run, expected[family]))

    workers = [threading.Thread(target=work, args=(family,)) for family in families]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not any(worker.is_alive() for worker in workers)
    assert wrong == []


def test_a_forked_child_has_threads_of_its_own(packed: Packed) -> None:
    """Fork while the parent's threads wait; both then compute, the child exits without waiting for anybody."""
    program = (
        "import os, warnings, torch\n"
        "from tests.integration.engine_fast import tiny\n"
        "from worker import kernels\n"
        "from worker.engine.fast import fast_decoder\n"
        "warnings.simplefilter('ignore', DeprecationWarning)\n"
        "torch.set_num_threads(1)\n"
        "decoder = fast_decoder(tiny.model('llama'))\n"
        "kernels.load().set_threads(2)\n"
        "run = lambda: tiny.prefill(decoder, decoder.open_pool(1), [0], tiny.text(50))\n"
        "before = run()\n"
        "child = os.fork()\n"
        "same = bool((run() == before).all())\n"
        "if child == 0: os._exit(0 if same else 1)\n"
        "_, status = os.waitpid(child, 0)\n"
        "print(same, status)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=90, check=True
    )
    assert result.stdout.split() == ["True", "0"]


def _changed(family: str, change: Callable[[Any], object]) -> Any:
    model = tiny.model(family)
    change(model)
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model.config, "hidden_size", 65), "hidden size"),
        (lambda model: setattr(model.config, "intermediate_size", 100), "intermediate size"),
        (lambda model: setattr(model.config, "head_dim", 24), "multiple"),
        (lambda model: setattr(model.config, "hidden_act", "relu"), "activation"),
        (lambda model: model.config.rope_parameters.update(rope_type="dynamic"), "rotary"),
        (lambda model: setattr(model.model.layers[1].mlp, "up_proj", nn.Linear(64, 128)), "biases"),
        (lambda model: setattr(model.model.layers[0].self_attn, "q_proj", nn.Identity()), "another kind"),
    ],
)
def test_the_reason_names_what_does_not_fit(change: Callable[[Any], object], reason: str) -> None:
    model = _changed("llama", change)
    assert reason in why_not(model)
    with pytest.raises(UnsupportedFeature, match=reason):
        fast_decoder(model)


def test_another_family_is_named() -> None:
    assert "Linear is not one of the families" in why_not(nn.Linear(1, 1))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_known_families_fit(reference: Callable[[str], Any], family: str) -> None:
    assert why_not(reference(family)) == ""
