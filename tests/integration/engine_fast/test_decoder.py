"""The fast path against transformers in fp32, and a row's bits in every company."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integration.engine_fast import tiny
from tests.integration.engine_fast.conftest import Packed
from worker import kernels
from worker.engine.attention import KVRow
from worker.engine.fast import FastDecoder, FastRows
from worker.engine.fast.packing import KindOf, all_int8
from worker.kernels import Isa, Kind

LENGTH = 100
"""More than a block, and more than a window."""


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_are_transformers_for_the_packed_weights(packed: Packed, family: str) -> None:
    """With weights equal, int16 activations and fp32 keys and values cost less than a thousandth."""
    model = tiny.model(family)
    tiny.round_weights(model)
    tokens = tiny.text(LENGTH)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    decoder = packed(family, torch.float32)
    logits = tiny.prefill(decoder, decoder.open_pool(3), [2, 0], tokens)
    assert float((logits - expected).abs().max()) <= 1e-3 * float(expected.abs().max())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_stay_close_to_fp32(packed: Packed, reference: Callable[[str], Any], family: str) -> None:
    """What int8 weights cost; random weights of this size leave no structure that would dampen it."""
    tokens = tiny.text(LENGTH)
    with torch.inference_mode():
        expected = reference(family)(torch.tensor([tokens])).logits[0]
    decoder = packed(family)
    logits = tiny.prefill(decoder, decoder.open_pool(3), [2, 0], tokens)
    error = (logits - expected).pow(2).mean().sqrt() / expected.std()
    assert float(error) <= 0.06


def _fp32(name: str) -> Kind:
    return Kind.FP32


def _mixed(name: str) -> Kind:
    """Every kind in every place."""
    order = ("embedding", "qkv", "out", "gate_up", "down", "head")
    layer = int(name.split(".")[1]) if "." in name else 0
    return Kind((order.index(name.rpartition(".")[2]) + layer) % len(Kind))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_fp32_weights_give_the_logits_of_transformers(
    packed: Packed, reference: Callable[[str], Any], family: str
) -> None:
    tokens, decoder = tiny.text(LENGTH), packed(family, torch.float32, None, _fp32)
    with torch.inference_mode():
        expected = reference(family)(torch.tensor([tokens])).logits[0]
    logits = tiny.prefill(decoder, decoder.open_pool(3), [2, 0], tokens)
    assert float((logits - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.float32])
def test_prefill_in_one_call_equals_decode_steps(packed: Packed, family: str, kv_dtype: torch.dtype) -> None:
    decoder, tokens = packed(family, kv_dtype), tiny.text(LENGTH)
    at_once = tiny.prefill(decoder, decoder.open_pool(3), [2, 0], tokens)
    pool = decoder.open_pool(4)
    slots = pool.slots([1, 3])
    steps = [
        decoder.forward([token], [position], FastRows(pool, [KVRow(slots, position + 1)]), [0])
        for position, token in enumerate(tokens)
    ]
    assert torch.equal(torch.cat(steps), at_once)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("kind_of", [all_int8, _mixed])
def test_instruction_sets_agree_bit_for_bit(packed: Packed, family: str, kind_of: KindOf) -> None:
    tokens = tiny.text(LENGTH)
    results = []
    for isa in kernels.load().supported():
        decoder = packed(family, torch.float16, isa, kind_of)
        results.append(tiny.prefill(decoder, decoder.open_pool(2), [0, 1], tokens))
    assert all(torch.equal(result, results[0]) for result in results)


class _Sequences:
    """32 sequences of different lengths, prefilled; one more token of each is to come."""

    def __init__(self, decoder: FastDecoder) -> None:
        self.decoder = decoder
        self.pool = decoder.open_pool(64)
        self.texts = [tiny.text(3 + 29 * number % 97, number) for number in range(32)]
        self.slots = [self.pool.slots([number, 63 - number]) for number in range(32)]
        for number, text in enumerate(self.texts):
            tiny.prefill(decoder, self.pool, [number, 63 - number], text)

    def step(self, numbers: list[int]) -> Tensor:
        lengths = [len(self.texts[number]) for number in numbers]
        rows = [KVRow(self.slots[number], length + 1) for number, length in zip(numbers, lengths, strict=True)]
        wanted = range(len(numbers))
        return self.decoder.forward([n + 7 for n in numbers], lengths, FastRows(self.pool, rows), wanted)


@pytest.mark.parametrize(
    ("family", "kind_of"),
    [("llama", all_int8), ("llama", _mixed), ("qwen3", all_int8), ("gemma3", all_int8), ("gemma3", _mixed)],
)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(packed: Packed, family: str, kind_of: KindOf) -> None:
    sequences = _Sequences(packed(family, torch.float16, None, kind_of))
    kernels.load().set_threads(1)
    alone = torch.cat([sequences.step([number]) for number in range(32)])
    generator = torch.Generator().manual_seed(5)
    for threads in (1, 2, 3):
        kernels.load().set_threads(threads)
        assert torch.equal(torch.cat([sequences.step([number]) for number in range(32)]), alone)
        for size in (2, 3, 5, 7, 8, 12, 13, 16, 31, 32):
            numbers = torch.randperm(32, generator=generator)[:size].tolist()
            assert torch.equal(sequences.step(numbers), alone[numbers])


def test_prefill_and_decode_rows_share_a_step(packed: Packed) -> None:
    sequences = _Sequences(packed("llama"))
    alone = sequences.step([4])
    text, pool = tiny.text(40, 99), sequences.pool
    fresh = pool.slots([4 + 32 - 1 - 4])  # a block of its own: 31, which no sequence of this test's step uses
    rows = [KVRow(fresh, position + 1) for position in range(40)]
    length = len(sequences.texts[4])
    rows.insert(17, KVRow(sequences.slots[4], length + 1))
    tokens, positions = [*text[:17], 11, *text[17:]], [*range(17), length, *range(17, 40)]
    assert torch.equal(packed("llama").forward(tokens, positions, FastRows(pool, rows), [17]), alone)


def test_long_steps_and_repeated_rows(packed: Packed) -> None:
    """More rows than one call takes; a row asked for twice; in any order."""
    decoder = packed("llama")
    pool = decoder.open_pool(8)
    first, second = tiny.text(200, 1), tiny.text(200, 2)
    slots = pool.slots([0, 1, 2, 3]), pool.slots([4, 5, 6, 7])
    rows = FastRows(pool, [KVRow(own, position + 1) for own in slots for position in range(200)])
    logits = decoder.forward([*first, *second], [*range(200), *range(200)], rows, [399, 3, 3, 255, 256])
    other = decoder.open_pool(8)
    alone = [
        tiny.prefill(decoder, other, blocks, text) for blocks, text in (([1, 2, 3, 0], first), ([4, 5, 6, 7], second))
    ]
    assert torch.equal(logits, torch.cat(alone)[[399, 3, 3, 255, 256]])


def test_a_copied_block_serves_as_well(packed: Packed) -> None:
    decoder, tokens = packed("gemma3"), tiny.text(40)
    pool = decoder.open_pool(3)
    tiny.prefill(decoder, pool, [0], tokens)
    pool.copy_block(0, 2)
    both = [decoder.forward([9], [40], FastRows(pool, [KVRow(pool.slots([block]), 41)]), [0]) for block in (0, 2)]
    assert torch.equal(*both)


@pytest.mark.parametrize("isa", list(Isa))
@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.float32])
def test_keys_and_values_lie_where_the_pool_says(packed: Packed, isa: Isa, kv_dtype: torch.dtype) -> None:
    if isa not in kernels.load().supported():
        pytest.skip("this processor does not have it")
    decoder, tokens = packed("llama", kv_dtype, isa), tiny.text(64)
    pool = decoder.open_pool(2)
    tiny.prefill(decoder, pool, [1], tokens)
    model = tiny.model("llama")
    tiny.round_weights(model)
    with torch.inference_mode():
        cache = model(torch.tensor([tokens]), use_cache=True).past_key_values
    keys, values = pool.read(2, 1)
    for ours, theirs in ((keys, cache.layers[2].keys[0]), (values, cache.layers[2].values[0])):
        assert float((ours.float() - theirs).abs().max()) <= 3e-3 * float(theirs.abs().max())
