"""What decides a torch worker's bytes besides the model version. Imported in the engine process only."""

from __future__ import annotations

import platform

import llguidance
import torch
import transformers

from worker.engine.model import DTYPE

ENGINE_REVISION = 1
"""To be raised with every change of `worker/engine` that can change a token."""


KERNEL_REVISION = 1
"""To be raised with every change of `worker/kernels` or `worker/engine/fast` that can change a token."""


def torch_fingerprint(device: torch.device | None = None, precision: str = "fp32") -> str:
    """Equal on two workers only if an exact request may be resumed from one on the other."""
    if device is not None and device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}"
    dtype = str(DTYPE).removeprefix("torch.")
    libraries = f"torch-{torch.__version__} transformers-{transformers.__version__} llguidance-{llguidance.__version__}"
    kernels = "" if precision == "fp32" else f" {precision} kernels-{KERNEL_REVISION}"
    return f"engine-{ENGINE_REVISION} {dtype}{kernels} {processor} {libraries}"
