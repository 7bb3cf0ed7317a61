"""What decides a torch worker's bytes besides the model version. Imported in the engine process only."""

from __future__ import annotations

import platform

import llguidance
import torch
import transformers

from llmos.store.precision import Precision
from worker.engine.loading import cuda_dtype
from worker.engine.model import DTYPE

ENGINE_REVISION = 2
"""To be raised with every change of `worker/engine` that can change a token."""


KERNEL_REVISION = 2
"""To be raised with every change of `worker/kernels` or `worker/engine/fast` that can change a token."""


CUDA_REVISION = 1
"""To be raised with every change of `worker/engine/cuda` that can change a token."""


def torch_fingerprint(
    device: torch.device | None = None, precision: Precision = "fp32", *, kernels: bool = True
) -> str:
    """Equal on two workers only if an exact request may be resumed from one on the other.

    `kernels`: whether they compute what they can, where the precision is not fp32.
    """
    libraries = f"torch-{torch.__version__} transformers-{transformers.__version__} llguidance-{llguidance.__version__}"
    if device is not None and device.type == "cuda":
        numerics = f"{_name(cuda_dtype(precision))} cuda-{CUDA_REVISION}"
        import triton

        processor = f"{torch.cuda.get_device_name(device)} {torch.version.cuda} triton-{triton.__version__}"
        return f"engine-{ENGINE_REVISION} {numerics} {processor} {libraries}"
    processor = f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}"
    dtype = _name(DTYPE)
    how = f"{precision} kernels-{KERNEL_REVISION}" if kernels else f"{precision} torch"
    numerics = dtype if precision == "fp32" else f"{dtype} {how}"
    return f"engine-{ENGINE_REVISION} {numerics} {processor} {libraries}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
