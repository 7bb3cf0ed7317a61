"""Random LoRA adapters for a model, in PEFT's files. What they change does not matter; what they cost does."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llmos.store.adapter import CONFIG, WEIGHTS, projection

RANK = 8
STRENGTH = 0.01


def write(base: Path, folder: Path, seed: int) -> None:
    """An adapter of every projection of the model in `base` (safetensors), written to the new folder `folder`."""
    source, tensors = torch.Generator().manual_seed(seed), {}
    for path in base.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  no dictionary
                module = name.removesuffix(".weight")
                if projection(module) is not None:
                    outputs, inputs = file.get_slice(name).get_shape()
                    down = torch.randn(RANK, inputs, generator=source) * STRENGTH
                    tensors[f"base_model.model.{module}.lora_A.weight"] = down
                    up = torch.randn(outputs, RANK, generator=source) * STRENGTH
                    tensors[f"base_model.model.{module}.lora_B.weight"] = up
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none"}))
