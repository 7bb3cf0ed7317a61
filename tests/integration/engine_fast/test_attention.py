"""Paged attention against torch's, for whole layers, windows and rows in any company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.integration.engine_fast import tiny
from tests.integration.engine_fast.conftest import Packed
from worker import kernels
from worker.engine.attention import KVRow
from worker.engine.fast import FastKVPool, FastRows
from worker.kernels import Isa

LENGTH = 150
BLOCKS = (2, 0, 3)


def _reference(pool: FastKVPool, layer: int, queries: Tensor, positions: list[int], window: int | None) -> Tensor:
    parts = [pool.read(layer, block) for block in BLOCKS]
    keys, values = (torch.cat([part[which] for part in parts], dim=1).double() for which in (0, 1))
    share = queries.shape[1] // keys.shape[0]
    keys, values = keys.repeat_interleave(share, 0), values.repeat_interleave(share, 0)
    rows = []
    for query, position in zip(queries.double(), positions, strict=True):
        seen = slice(0 if window is None else max(0, position + 1 - window), position + 1)
        weights = (keys[:, seen] @ query[:, :, None]).softmax(1)
        rows.append((weights * values[:, seen]).sum(1))
    return torch.stack(rows)


@pytest.mark.parametrize(("family", "layer", "window"), [("llama", 1, None), ("gemma3", 0, 24), ("gemma3", 1, None)])
@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("isa", list(Isa))
def test_attention_is_softmax_over_what_a_row_sees(
    packed: Packed, family: str, layer: int, window: int | None, kv_dtype: torch.dtype, isa: Isa
) -> None:
    if isa not in kernels.load().supported():
        pytest.skip("this processor does not have it")
    decoder = packed(family, kv_dtype, isa)
    pool = decoder.open_pool(4)
    tiny.prefill(decoder, pool, BLOCKS, tiny.text(LENGTH))
    slots = pool.slots(BLOCKS)
    positions = [0, 1, 2, 3, 22, 23, 24, 25, 62, 63, 64, 65, 66, 67, 68, 69, 70, 100, 127, 128, 148, 149]
    shape = decoder.layers[layer]
    queries = torch.randn(len(positions), 4, shape.key_dim, generator=torch.Generator().manual_seed(3))
    rows = [KVRow(slots, position + 1) for position in positions]
    ours = decoder.attend(layer, queries, positions, FastRows(pool, rows))
    expected = _reference(pool, layer, queries, positions, window)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=2e-5)
    for number, row in enumerate(rows):
        alone = decoder.attend(layer, queries[number : number + 1], [positions[number]], FastRows(pool, [row]))
        assert torch.equal(alone[0], ours[number])
