"""Random LoRA adapters as PEFT saves them, and the model that each stands for."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmos.store.adapter import CONFIG, TARGETS, WEIGHTS
from worker.engine.lora import Adapter, make_adapter

Pairs = dict[str, tuple[Tensor, Tensor]]
"""A [rank, inputs] and B [outputs, rank] by name of the module."""


@dataclass(frozen=True, slots=True)
class RandomAdapter:
    """Strong enough to change most tokens of a tiny model."""

    pairs: Pairs
    rank: int
    alpha: float

    @classmethod
    def of(
        cls, model: Any, seed: int, *, rank: int = 4, targets: Sequence[str] = TARGETS, strength: float = 0.2
    ) -> RandomAdapter:
        """For a transformers model; the same every time."""
        source = torch.Generator().manual_seed(seed)
        pairs = {}
        for name, module in model.named_modules():
            if name.split(".")[-1] in targets:
                outputs, inputs = module.weight.shape
                down = torch.randn(rank, inputs, generator=source) / inputs**0.5
                pairs[name] = down, torch.randn(outputs, rank, generator=source) * strength
        return cls(pairs, rank, 2.0 * rank)

    def write(self, folder: Path, **config: Any) -> Path:
        """PEFT's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, (down, up) in self.pairs.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = down.contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = up.contiguous()
        save_file(tensors, folder / WEIGHTS)
        targets = sorted({name.split(".")[-1] for name in self.pairs})
        plain = {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": targets,
            "bias": "none",
        }
        (folder / CONFIG).write_text(json.dumps({**plain, **config}))
        return folder

    def adapter(self) -> Adapter:
        """As the engine holds it."""
        pairs = {(int(name.split(".")[2]), name.split(".")[-1]): pair for name, pair in self.pairs.items()}
        return make_adapter(pairs, self.alpha / self.rank)

    def merged(self, model: Any) -> Any:
        """A copy of the model with W + scale B A in place of W."""
        made = copy.deepcopy(model)
        with torch.no_grad():
            for name, (down, up) in self.pairs.items():
                made.get_submodule(name).weight += self.alpha / self.rank * (up @ down)
        return made
