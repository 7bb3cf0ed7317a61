"""From a model's folder to what the step loop runs: the kernels if they are wanted and fit, else the general path."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from worker.engine import model as general
from worker.engine.fast import fast_decoder, why_not
from worker.engine.paged import Servable

log = logging.getLogger(__name__)


def load(folder: Path, device: torch.device, context_length: int = 0, *, kernels: bool = False) -> Servable:
    """Read a folder of safetensors and config.json. Raises SourceError or UnsupportedFeature if it cannot serve.

    `context_length` lowers the model's own limit; 0 keeps it. `kernels`: int8 where the kernels can run the model.
    """
    model = general.read(folder, device)
    if not kernels:
        return general.prepare(model, device, context_length)
    if reason := why_not(model):
        log.warning("served in fp32, not by the kernels in int8: %s", reason)
        return general.prepare(model, device, context_length)
    config = model.config.get_text_config()
    limit = general.context_limit(config, context_length)
    return fast_decoder(model, context_length=limit, end_tokens=general.end_tokens(model, config))
