"""From a model's folder to what the step loop runs: the kernels where a plan wants them and they fit, else torch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from llmos.store.precision import Precision, PrecisionPlan
from worker.engine import model as general
from worker.engine.fast import fast_decoder, packing, why_not
from worker.engine.paged import Servable

log = logging.getLogger(__name__)

_CUDA_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}


def load(
    folder: Path,
    device: torch.device,
    context_length: int = 0,
    *,
    precision: Precision = "auto",
    plan: PrecisionPlan | None = None,
    kernels: bool = False,
) -> Servable:
    """Read a folder of safetensors and config.json. Raises SourceError or UnsupportedFeature if it cannot serve.

    `context_length` lowers the model's own limit; 0 keeps it. `plan` is the version's, which `auto` follows; without
    one it is fp32. `kernels`: whether they may be used. On CUDA `auto` is bf16 and plans are not followed.
    """
    if device.type == "cuda":
        return general.prepare(general.read(folder, device, dtype=cuda_dtype(precision)), device, context_length)
    exact = precision == "fp32" or (precision == "auto" and (plan is None or plan.exact))
    model = general.read(folder, device, dtype="auto" if kernels and not exact else general.DTYPE)
    wanted = None if exact else _wanted(precision, plan, model)
    if wanted is None:
        return general.prepare(model, device, context_length)
    reason = why_not(model) if kernels else "there are no kernels here"
    if not reason:
        config = model.config.get_text_config()
        limit = general.context_limit(config, context_length)
        ends = general.end_tokens(model, config)
        return fast_decoder(model, context_length=limit, end_tokens=ends, kind_of=packing.planned(wanted))
    log.warning("computed in %s by torch, which is slower than fp32: %s", precision, reason)
    return general.prepare(model.float(), device, context_length, wanted)


def cuda_dtype(precision: Precision) -> torch.dtype:
    """What a decoder computes in on CUDA; sums are float32 everywhere."""
    return _CUDA_DTYPES.get(precision, torch.bfloat16)


def _wanted(precision: Precision, plan: PrecisionPlan | None, model: Any) -> PrecisionPlan | None:
    if precision == "auto":
        return plan
    return PrecisionPlan.uniform(precision, model.config.get_text_config().num_hidden_layers)
