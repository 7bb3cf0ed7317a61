"""Adapters in the kernels: against fp32 arithmetic, and a row's bits in every company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmos.errors import SourceError
from tests.fakes.adapters import RandomAdapter
from tests.integration.engine_fast import tiny
from worker import kernels
from worker.engine.attention import KVRow
from worker.engine.fast import FastDecoder, FastRows, fast_decoder
from worker.engine.fast.packing import KindOf, all_int8
from worker.engine.lora import Adapter
from worker.kernels import Isa, Kind

LENGTH = 70


def adapted(model: Any, isa: Isa | None = None, kind_of: KindOf = all_int8) -> tuple[FastDecoder, list[RandomAdapter]]:
    """A decoder of its own with adapters 1 to 4, of which 2 changes little."""
    decoder = fast_decoder(model, kv_dtype=torch.float32, isa=isa, kind_of=kind_of)
    made = [RandomAdapter.of(model, seed, rank=rank, strength=0.05) for seed, rank in enumerate((8, 3, 64, 17))]
    made[1] = RandomAdapter.of(model, 1, rank=3, targets=["v_proj"])
    for number, one in enumerate(made, 1):
        decoder.put_adapter(number, one.adapter())
    return decoder, made


def prefill(decoder: FastDecoder, tokens: list[int], adapter: int) -> Tensor:
    pool = decoder.open_pool(2)
    rows = FastRows(pool, [KVRow(pool.slots([1, 0]), place + 1) for place in range(len(tokens))])
    return decoder.forward(tokens, range(len(tokens)), rows, range(len(tokens)), [adapter] * len(tokens))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_are_those_of_the_merged_weights(family: str) -> None:
    """With the base's weights equal, and the adapters' in fp16; the strongest changes more than the base holds."""
    decoder, made = adapted(model := tiny.model(family))
    tiny.round_weights(model)
    tokens = tiny.text(LENGTH)
    for number, one in enumerate(made, 1):
        with torch.inference_mode():
            expected = one.merged(model)(torch.tensor([tokens])).logits[0]
        error = prefill(decoder, tokens, number) - expected
        assert float(error.abs().max()) <= 3e-3 * float(expected.abs().max())


def mixed_kinds(name: str) -> Kind:
    """Half of a layer in fp16, all else in fp32."""
    return Kind.FP16 if name.split(".")[-1] in ("out", "gate_up") else Kind.FP32


def test_matrices_of_any_kind_have_adapters() -> None:
    decoder, made = adapted(model := tiny.model("llama"), kind_of=mixed_kinds)
    texts = [tiny.text(3 + 7 * n, n) for n in range(10)]
    alone = [prefill(decoder, text, n % 5)[-1] for n, text in enumerate(texts)]
    assert all(torch.equal(*pair) for pair in zip(_together(decoder, texts), alone, strict=True))
    with torch.inference_mode():
        expected = made[3].merged(model)(torch.tensor([texts[4]])).logits[0, -1]
    assert float((alone[4] - expected).abs().max()) <= 3e-3 * float(expected.abs().max())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_row_has_the_same_bits_in_any_batch_with_any_threads_and_instructions(family: str) -> None:
    model, texts = tiny.model(family), [tiny.text(3 + 7 * n, n) for n in range(10)]
    wanted: list[Tensor] = []
    for isa in kernels.load().supported():
        decoder, _ = adapted(model, isa)
        for threads in (1, 3):
            kernels.load().set_threads(threads)
            alone = [prefill(decoder, text, n % 5)[-1] for n, text in enumerate(texts)]
            wanted = wanted or alone
            assert all(torch.equal(*pair) for pair in zip(alone, wanted, strict=True))
            assert all(torch.equal(*pair) for pair in zip(_together(decoder, texts), wanted, strict=True))


def _together(decoder: FastDecoder, texts: list[list[int]]) -> Tensor:
    """Last logits of each text: all but the last token in one call, then one step for all."""
    pool = decoder.open_pool(2 * len(texts))
    slots = [pool.slots([2 * n, 2 * n + 1]) for n in range(len(texts))]
    rows = [(n, place) for n, text in enumerate(texts) for place in range(len(text) - 1)]
    for step in (rows, [(n, len(text) - 1) for n, text in enumerate(texts)]):
        where = FastRows(pool, [KVRow(slots[n], place + 1) for n, place in step])
        tokens, places = [texts[n][place] for n, place in step], [place for _, place in step]
        logits = decoder.forward(tokens, places, where, range(len(step)), [n % 5 for n, _ in step])
    return logits


def test_steps_without_adapters_are_as_before_and_dropped_ones_are_refused() -> None:
    model, tokens = tiny.model("llama"), tiny.text(20)
    decoder, made = adapted(model)
    plain = prefill(fast_decoder(model, kv_dtype=torch.float32), tokens, 0)
    assert torch.equal(prefill(decoder, tokens, 0), plain)
    first = prefill(decoder, tokens, 1)
    decoder.drop_adapter(3)
    decoder.drop_adapter(4)
    assert torch.equal(prefill(decoder, tokens, 1), first)
    for gone in (3, 4, 9):
        with pytest.raises(ValueError, match="adapter"):
            prefill(decoder, tokens, gone)
    decoder.put_adapter(3, made[0].adapter())
    assert torch.equal(prefill(decoder, tokens, 3), first)


def test_what_does_not_fit_is_refused() -> None:
    decoder, _ = adapted(tiny.model("llama"))
    with pytest.raises(SourceError, match="does not fit"):
        decoder.put_adapter(5, RandomAdapter.of(tiny.model("gemma3"), 1).adapter())
    with pytest.raises(SourceError, match="rank"):
        decoder.put_adapter(5, Adapter(72, {}))
