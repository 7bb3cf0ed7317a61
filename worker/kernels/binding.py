"""Typed access to the kernels. Every tensor is checked for type, shape and layout before its address is handed over."""

from __future__ import annotations

import ctypes
import enum
import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from llmos.errors import UnsupportedFeature
from worker.kernels import abi
from worker.kernels.build import find_library
from worker.kernels.library import open_library

log = logging.getLogger(__name__)


class Isa(enum.IntEnum):
    """Instruction sets that the kernels are compiled for. All give the same bits."""

    PORTABLE = 0
    AVX2 = 1
    AVX512_VNNI = 2


class Activation(enum.IntEnum):
    """What stands between gate and up."""

    SILU = 0
    GELU_TANH = 1


class Kind(enum.IntEnum):
    """How a matrix stores its weights, and what it multiplies them with. Chosen per matrix."""

    INT8 = 0
    """Groups of 64 inputs with a bfloat16 scale each; activations in int16 with a scale per row."""
    FP16 = 1
    """Rounded to nearest, held at +-65504; activations and sums in fp32, one chain in order of the inputs."""
    FP32 = 2
    """As they are; activations and sums in fp32, one chain in order of the inputs."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """Weights of a linear layer in the kernels' layout, [outputs, inputs]; owns its memory."""

    data: Tensor
    outputs: int
    inputs: int
    kind: Kind = Kind.INT8

    def descriptor(self) -> abi.Matrix:
        """Its C structure, valid as long as this object lives."""
        return abi.Matrix(self.data.data_ptr(), self.outputs, self.inputs, self.kind)


class Kernels:
    """The loaded library. Functions are safe to call from any thread; parallel steps take turns."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

        self.isa = Isa(library.llk_best_isa())
        """The best instruction set of this processor."""

    def supported(self) -> list[Isa]:
        """Instruction sets that this processor can run."""
        return [isa for isa in Isa if self.library.llk_isa_supported(isa)]

    @property
    def threads(self) -> int:
        """Threads of a step, for the whole process."""
        return int(self.library.llk_threads())

    def set_threads(self, threads: int) -> None:
        """From the next step on. The threads start when they are first needed."""
        self.library.llk_set_threads(threads)

    def pack(self, weight: Tensor, into: Tensor | None = None, kind: Kind = Kind.INT8) -> PackedMatrix:
        """Pack [outputs, inputs] floats; `into` is uint8 memory of `packed_bytes`, aligned to 64, else allocated."""
        outputs, inputs = weight.shape
        source = weight.detach().to(device="cpu", dtype=torch.float32).contiguous()
        size = self.packed_bytes(outputs, inputs, kind)
        target = torch.empty(size, dtype=torch.uint8) if into is None else into
        _expect(target, torch.uint8, (size,))
        check(self.library.llk_pack(kind, source.data_ptr(), outputs, inputs, target.data_ptr()))
        return PackedMatrix(target, outputs, inputs, kind)

    def packed_bytes(self, outputs: int, inputs: int, kind: Kind = Kind.INT8) -> int:
        """Memory of a packed matrix. Raises ValueError if the shape cannot be packed."""
        size = int(self.library.llk_packed_bytes(kind, outputs, inputs))
        if not size:
            raise ValueError(f"{inputs} inputs are not a multiple of {abi.GROUP}")
        return size

    def unpack(self, matrix: PackedMatrix) -> Tensor:
        """The floats that the packed weights stand for, [outputs, inputs]."""
        out = torch.empty(matrix.outputs, matrix.inputs)
        check(self.library.llk_unpack(ctypes.byref(matrix.descriptor()), out.data_ptr()))
        return out

    def quantize(
        self, x: Tensor, norm: Tensor | None = None, epsilon: float = 0.0, isa: Isa = Isa.PORTABLE
    ) -> tuple[Tensor, Tensor]:
        """[rows, width] floats, RMS-normed if `norm` [width] is given, to int16 and a scale per row."""
        _expect(x, torch.float32, (None, None))
        rows, width = x.shape
        if norm is not None:
            _expect(norm, torch.float32, (width,))
        quantized, scales = torch.empty(rows, width, dtype=torch.int16), torch.empty(rows)
        check(
            self.library.llk_quantize(
                isa, x.data_ptr(), address(norm), epsilon, rows, width, quantized.data_ptr(), scales.data_ptr()
            )
        )
        return quantized, scales

    def gemm(self, matrix: PackedMatrix, quantized: Tensor, scales: Tensor, isa: Isa = Isa.PORTABLE) -> Tensor:
        """An int8 matrix: [rows, inputs] int16 and [rows] scales to [rows, outputs] floats; in the calling thread."""
        _expect(quantized, torch.int16, (None, matrix.inputs))
        rows = quantized.shape[0]
        _expect(scales, torch.float32, (rows,))
        out = torch.empty(rows, matrix.outputs)
        descriptor = ctypes.byref(matrix.descriptor())
        check(self.library.llk_gemm(isa, descriptor, quantized.data_ptr(), scales.data_ptr(), rows, out.data_ptr()))
        return out

    def gemm_float(self, matrix: PackedMatrix, x: Tensor, isa: Isa = Isa.PORTABLE) -> Tensor:
        """An fp16 or fp32 matrix: [rows, inputs] to [rows, outputs] floats; in the calling thread."""
        _expect(x, torch.float32, (None, matrix.inputs))
        out = torch.empty(x.shape[0], matrix.outputs)
        descriptor = ctypes.byref(matrix.descriptor())
        check(self.library.llk_gemm_float(isa, descriptor, x.data_ptr(), x.shape[0], out.data_ptr()))
        return out

    def product(self, matrix: PackedMatrix, x: Tensor, isa: Isa = Isa.PORTABLE) -> Tensor:
        """A matrix of any kind: [rows, inputs] to [rows, outputs] floats; in the calling thread."""
        if matrix.kind is Kind.INT8:
            return self.gemm(matrix, *self.quantize(x, isa=isa), isa)
        return self.gemm_float(matrix, x, isa)

    def pick(self, rows: ctypes.Array[abi.PickRow], vocabulary: int, isa: Isa | None = None) -> list[int | None]:
        """The next token of each row; None where the logits are not numbers. The caller keeps the logits alive."""
        picks = (ctypes.c_int32 * len(rows))()
        check(self.library.llk_pick(self.isa if isa is None else isa, rows, len(rows), vocabulary, picks))
        return [None if pick < 0 else pick for pick in picks]

    def activate(self, kind: Activation, x: Tensor, isa: Isa = Isa.PORTABLE) -> Tensor:
        """The activation of each element; their number is a multiple of 8."""
        _expect(x, torch.float32, (None,))
        out = torch.empty_like(x)
        check(self.library.llk_activate(isa, kind, x.data_ptr(), x.shape[0], out.data_ptr()))
        return out


def address(tensor: Tensor | None) -> int | None:
    """Address of a contiguous float tensor on the CPU, or NULL."""
    if tensor is None:
        return None
    _expect(tensor, torch.float32, (None,) * tensor.ndim)
    return tensor.data_ptr()


def check(status: int) -> None:
    """Raise ValueError (MemoryError) for a kernel's status other than 0."""
    if status:
        error = MemoryError if status == max(abi.MESSAGES) else ValueError
        raise error(abi.MESSAGES[status])


def _expect(tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    fits = tensor.ndim == len(shape) and all(
        wanted is None or wanted == size for wanted, size in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous() or not fits:
        raise ValueError(
            f"a contiguous {dtype} CPU tensor of shape {shape} is needed, not {tensor.dtype} {tensor.shape}"
        )


@functools.cache
def _open() -> Kernels | str:
    """The kernels, or why there are none. Said once."""
    library = open_library()
    if isinstance(library, str):
        log.warning("own kernels are not used, torch's are: %s", library)
        return library
    return Kernels(library)


def available() -> bool:
    """Whether the kernels can be used here. The first call may compile them."""
    return isinstance(_open(), Kernels)


def reason() -> str:
    """Why they cannot be used; empty if they can."""
    found = _open()
    return found if isinstance(found, str) else ""


def present() -> Kernels | None:
    """The kernels, if they are loaded or need no compiling."""
    if not open_library.cache_info().currsize and find_library() is None:
        return None
    found = _open()
    return found if isinstance(found, Kernels) else None


def load() -> Kernels:
    """The kernels. Raises UnsupportedFeature if there are none."""
    found = _open()
    if isinstance(found, str):
        raise UnsupportedFeature(f"The kernels cannot be used here: {found}.")
    return found
