"""Each kernel against torch, and every instruction set against the portable one, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from worker.kernels import Isa, Kernels, Kind
from worker.kernels.binding import Activation, PackedMatrix


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _matrix(kernels: Kernels, outputs: int, inputs: int) -> tuple[Tensor, PackedMatrix]:
    weight = _normal(outputs, inputs, seed=1) * torch.logspace(-3, 3, inputs // 64).repeat_interleave(64)
    return weight, kernels.pack(weight)


@pytest.mark.parametrize(("outputs", "inputs"), [(16, 64), (40, 192), (1, 64), (31, 128)])
def test_unpacked_weights_differ_by_half_a_step_of_their_group(loaded: Kernels, outputs: int, inputs: int) -> None:
    weight, packed = _matrix(loaded, outputs, inputs)
    groups = weight.view(outputs, -1, 64)
    # A scale is rounded up to bfloat16, by less than a 128th.
    step = groups.abs().amax(-1, keepdim=True) / 127 * (1 + 2**-7)
    error = (loaded.unpack(packed).view_as(groups) - groups).abs()
    assert (error <= step * 0.501).all()


def test_weights_of_zero_stay_zero(loaded: Kernels) -> None:
    assert not loaded.unpack(loaded.pack(torch.zeros(17, 64))).any()


@pytest.mark.parametrize("kind", [Kind.FP16, Kind.FP32])
def test_floating_point_weights_are_kept(loaded: Kernels, kind: Kind) -> None:
    weight = _normal(31, 128) * torch.logspace(-8, 4, 31)[:, None]
    expected = weight.half().float() if kind is Kind.FP16 else weight
    assert torch.equal(loaded.unpack(loaded.pack(weight, kind=kind)), expected)
    assert float(loaded.unpack(loaded.pack(torch.full((1, 64), -1e9), kind=Kind.FP16))[0, 0]) == -65504.0


@pytest.mark.parametrize("kind", [Kind.FP16, Kind.FP32])
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 16, 17, 33])
def test_product_with_floating_point_weights(loaded: Kernels, isa: Isa, kind: Kind, rows: int) -> None:
    packed, x = loaded.pack(_normal(40, 192, seed=1), kind=kind), _normal(rows, 192)
    product = loaded.product(packed, x, isa)
    expected = x.double() @ loaded.unpack(packed).double().t()
    torch.testing.assert_close(product.double(), expected, rtol=2e-6, atol=2e-6 * float(expected.abs().max()))
    assert torch.equal(product, loaded.product(packed, x, Isa.PORTABLE))


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 12, 13, 33])
def test_product_is_that_of_the_quantized_operands(loaded: Kernels, isa: Isa, rows: int) -> None:
    _, packed = _matrix(loaded, 40, 192)
    quantized, scales = loaded.quantize(_normal(rows, 192), isa=isa)
    expected = (quantized.double() * scales.double()[:, None]) @ loaded.unpack(packed).double().t()
    product = loaded.gemm(packed, quantized, scales, isa)
    torch.testing.assert_close(product.double(), expected, rtol=2e-6, atol=2e-6 * float(expected.abs().max()))
    assert torch.equal(product, loaded.gemm(packed, quantized, scales, Isa.PORTABLE))


def test_product_of_the_largest_numbers_does_not_overflow(loaded: Kernels, isa: Isa) -> None:
    packed = loaded.pack(torch.full((16, 64), -3.0))
    quantized, scales = torch.full((1, 64), -32768, dtype=torch.int16), torch.ones(1)
    expected = 64 * 32768 * loaded.unpack(packed)[0, 0].neg()
    assert torch.equal(loaded.gemm(packed, quantized, scales, isa), expected.expand(1, 16))


@pytest.mark.parametrize("kind", list(Kind))
def test_a_row_of_a_product_does_not_depend_on_the_others(loaded: Kernels, isa: Isa, kind: Kind) -> None:
    packed, x = loaded.pack(_normal(48, 256, seed=1), kind=kind), _normal(40, 256)
    alone = torch.cat([loaded.product(packed, x[r : r + 1], isa) for r in range(40)])
    for rows in (2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 14, 15, 16, 20, 32, 40):
        assert torch.equal(loaded.product(packed, x[:rows], isa), alone[:rows])
        assert torch.equal(loaded.product(packed, x[-rows:].contiguous(), isa), alone[-rows:])


@pytest.mark.parametrize("normed", [False, True])
def test_quantized_rows_stand_for_the_normed_ones(loaded: Kernels, isa: Isa, normed: bool) -> None:
    x, norm = _normal(7, 200) * torch.logspace(-4, 4, 7)[:, None], _normal(200, seed=3)
    quantized, scales = loaded.quantize(x, norm if normed else None, 1e-6, isa)
    expected = nnf.rms_norm(x, (200,), norm, 1e-6) if normed else x
    step = expected.abs().amax(-1, keepdim=True) / 32767
    assert ((quantized * scales[:, None] - expected).abs() <= step * 0.52).all()
    portable = loaded.quantize(x, norm if normed else None, 1e-6, Isa.PORTABLE)
    assert torch.equal(quantized, portable[0])
    assert torch.equal(scales, portable[1])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 9, 63])
def test_what_is_no_number_shows_in_every_output(loaded: Kernels, isa: Isa, value: float, place: int) -> None:
    x = _normal(2, 64)
    x[1, place] = value
    product = loaded.gemm(loaded.pack(_normal(16, 64)), *loaded.quantize(x, isa=isa), isa)
    assert product[0].isfinite().all()
    assert not product[1].isfinite().any()


def test_a_row_of_zeros_is_zero(loaded: Kernels, isa: Isa) -> None:
    product = loaded.gemm(loaded.pack(_normal(16, 64)), *loaded.quantize(torch.zeros(1, 64), isa=isa), isa)
    assert not product.any()


@pytest.mark.parametrize("kind", list(Activation))
def test_activations_are_those_of_torch(loaded: Kernels, isa: Isa, kind: Activation) -> None:
    x = torch.cat([torch.linspace(-30, 30, 4000), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0, 1e4, -1e4])])
    reference = nnf.silu(x.double()) if kind is Activation.SILU else nnf.gelu(x.double(), approximate="tanh")
    ours = loaded.activate(kind, x, isa)
    torch.testing.assert_close(ours.double(), reference, rtol=2e-5, atol=1e-7)
    assert torch.equal(ours, loaded.activate(kind, x, Isa.PORTABLE))
    assert loaded.activate(kind, torch.full((8,), math.nan), isa).isnan().all()


def test_tensors_of_another_kind_are_refused(loaded: Kernels) -> None:
    packed = loaded.pack(_normal(16, 64))
    quantized, scales = loaded.quantize(_normal(2, 64))
    with pytest.raises(ValueError, match="multiple"):
        loaded.pack(_normal(16, 65))
    with pytest.raises(ValueError, match="contiguous"):
        loaded.gemm(packed, quantized.t().contiguous().t(), scales)
    with pytest.raises(ValueError, match="shape"):
        loaded.gemm_float(packed, _normal(2, 64))
    with pytest.raises(ValueError, match="int16"):
        loaded.gemm(packed, quantized.int(), scales)
    with pytest.raises(ValueError, match="shape"):
        loaded.gemm(packed, quantized, scales[:1])
    with pytest.raises(ValueError, match="shape"):
        loaded.quantize(_normal(2, 64), _normal(63))
