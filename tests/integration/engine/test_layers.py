"""Every operation that a step is made of gives a row the same bits, whatever the other rows are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from worker.engine.attention import KVRow, LayerCall, PagedAttention, register
from worker.engine.kv import KVPool, LayerShape
from worker.engine.layers import FixedRowLinear, SteadyActivation, steady_layers

pytestmark = pytest.mark.torch

THREADS = (1, 2, 3)


def check_rows(function: Callable[[Tensor], Tensor], width: int, rows: int = 72) -> None:
    """Each row alone, and in batches of other sizes and offsets, against one call of all rows."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)) * 3
    torch.set_num_threads(1)
    expected = function(x)
    for threads in THREADS:
        torch.set_num_threads(threads)
        for count in (1, 2, 7, 8, 9, 16, 33, 64):
            for first in (0, 3, 8):
                assert torch.equal(function(x[first : first + count].clone()), expected[first : first + count])


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(48, 80), (576, 1536), (1536, 576), (2048, 200), (33, 17), (600, 7000)]
)
def test_linear_rows(inputs: int, outputs: int) -> None:
    # 600 x 7000 is cut into column blocks; 1536 and 2048 inputs are where the row count changes plain products.
    layer = nn.Linear(inputs, outputs)
    with torch.inference_mode():
        fixed = FixedRowLinear(layer.weight, layer.bias)
        check_rows(fixed, inputs)
        x = torch.randn(3, 5, inputs)
        torch.testing.assert_close(fixed(x), layer(x))


def test_wide_linear_rows() -> None:
    layer = nn.Linear(384, 1536)
    with torch.inference_mode():
        wide = FixedRowLinear(layer.weight, layer.bias, wide=True)
        check_rows(wide, 384)
        x = torch.randn(91, 384)
        assert torch.equal(wide(x), FixedRowLinear(layer.weight, layer.bias)(x))


def test_linear_rows_without_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    layer = nn.Linear(576, 200, bias=False)
    with torch.inference_mode():
        check_rows(FixedRowLinear(layer.weight, None), 576)


def test_conv1d_becomes_the_same_linear() -> None:
    model = nn.Sequential(Conv1D(24, 16))
    layer = model[0]
    with torch.inference_mode():
        steady_layers(model)
        x = torch.randn(9, 16)
        assert isinstance(model[0], FixedRowLinear)
        torch.testing.assert_close(model[0](x), layer(x))


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "quick_gelu", "relu2", "mish"])
@pytest.mark.parametrize("width", [17, 48, 1504])
def test_activation_rows(name: str, width: int) -> None:
    with torch.inference_mode():
        steady = SteadyActivation(ACT2FN[name])
        check_rows(steady, width)
        x = torch.randn(40, width)
        torch.testing.assert_close(steady(x), ACT2FN[name](x))


@pytest.mark.parametrize("width", [48, 131, 640])
def test_norm_and_softmax_rows(width: int) -> None:
    with torch.inference_mode():
        for function in (
            nn.LayerNorm(width),
            lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
            lambda x: x.softmax(-1),
            lambda x: x.double().softmax(-1),
            lambda x: x.log_softmax(-1),
            torch.cos,
            torch.sin,
            torch.tanh,
        ):
            check_rows(function, width)


def test_long_rows_of_logits() -> None:
    # Longer than what torch hands to one thread.
    x = torch.randn(3, 70_001, generator=torch.Generator().manual_seed(3))
    for function in (
        lambda x: x.softmax(-1),
        lambda x: x.log_softmax(-1),
        lambda x: x.double().abs().log(),
        lambda x: x.argmax(-1),
    ):
        torch.set_num_threads(1)
        expected = function(x)
        for threads in THREADS:
            torch.set_num_threads(threads)
            assert torch.equal(function(x), expected)
            assert torch.equal(function(x[1:2].clone()), expected[1:2])


def reference(call: LayerCall, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One row by definition: [heads, dim] against [length, kv_heads, dim], in float64."""
    group = call.heads // call.shape.kv_heads
    first = 0 if call.window is None else max(0, keys.shape[0] - call.window)
    keys, values = (t[first:].double().repeat_interleave(group, dim=1) for t in (keys, values))
    scores = torch.einsum("hd,lhd->hl", query.double(), keys) * call.scaling
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    return torch.einsum("hl,lhd->hd", scores.softmax(-1), values)


def filled_pool(shape: LayerShape) -> KVPool:
    pool = KVPool([shape], 12, torch.device("cpu"), torch.float32)
    for tensor in (*pool.keys, *pool.values):
        tensor.normal_(generator=torch.Generator().manual_seed(6))
    return pool


@pytest.mark.parametrize(
    "call",
    [
        LayerCall(4, LayerShape(2, 16, 16), 0.25, None, None),
        LayerCall(3, LayerShape(3, 10, 6), 0.3, 70, 5.0),
        LayerCall(6, LayerShape(1, 64, 64), 0.125, 1, None),
    ],
)
def test_attention_rows(call: LayerCall) -> None:
    register()
    shape = call.shape
    lengths = (1, 2, 63, 64, 65, 100, 128, 300)
    tables = [[0], [1], [2], [3], [4, 5], [7, 6], [8, 9], [11, 1, 3, 0, 10]]
    query = torch.randn(call.heads, 8, shape.key_dim, generator=torch.Generator().manual_seed(2))
    key, value = torch.randn(shape.kv_heads, 8, shape.key_dim), torch.randn(shape.kv_heads, 8, shape.value_dim)

    def attend(chosen: list[int], threads: int) -> tuple[Tensor, KVPool]:
        torch.set_num_threads(threads)
        pool = filled_pool(shape)
        rows = [KVRow(pool.slots(tables[number]), lengths[number]) for number in chosen]
        targets = torch.stack([row.slots[row.length - 1] for row in rows])
        out = PagedAttention(pool, rows, targets).attend(0, call, *(t[:, chosen] for t in (query, key, value)))
        return out, pool

    for number in range(8):
        alone, pool = attend([number], 1)
        table = pool.slots(tables[number])[: lengths[number]]
        expected = reference(call, query[:, number], pool.keys[0][table], pool.values[0][table])
        torch.testing.assert_close(alone[0].double(), expected, atol=1e-5, rtol=1e-5)
        for threads in THREADS:
            for others in ([4, number], [number, 7], [0, 7, number, 5]):
                if len(set(others)) == len(others) and not _collide([tables[other] for other in others]):
                    assert torch.equal(attend(others, threads)[0][others.index(number)], alone[0])


def test_attention_in_many_small_groups_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    call = LayerCall(4, LayerShape(2, 16, 16), 0.25, None, None)
    lengths = (1, 70, 5, 130, 64, 2, 90)
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(heads, 8, 16, generator=generator) for heads in (4, 2, 2))
    found = []
    for limit in (1 << 20, 4 * 128, 1):
        monkeypatch.setattr("worker.engine.attention._GROUP_ELEMENTS", limit)
        pool = filled_pool(call.shape)
        rows = [KVRow(pool.slots([0, 1, 2]), length) for length in lengths]
        targets = torch.stack([row.slots[row.length - 1] for row in rows])
        found.append(PagedAttention(pool, rows, targets).attend(0, call, query, key, value))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert found[0][:7].any(-1).all() and not found[0][7].any()


def _collide(tables: list[list[int]]) -> bool:
    blocks = [block for table in tables for block in table]
    return len(set(blocks)) < len(blocks)
