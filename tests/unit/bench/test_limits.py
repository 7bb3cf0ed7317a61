"""What a decode step reads and multiplies, and means over texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from bench.divergence import mean
from bench.limits import matrices
from worker.quality.distance import Distance

LAYER = {
    "self_attn.q_proj": (4, 4),
    "self_attn.k_proj": (2, 4),
    "self_attn.v_proj": (2, 4),
    "self_attn.o_proj": (4, 4),
    "mlp.gate_proj": (6, 4),
    "mlp.up_proj": (6, 4),
    "mlp.down_proj": (4, 6),
}


@pytest.mark.parametrize(("tied", "head"), [(True, 40), (False, 44)])
def test_matrices_are_counted_under_the_plans_names_and_an_embedding_only_if_tied(
    tmp_path: Path, tied: bool, head: int
) -> None:
    tensors: dict[str, Any] = {
        f"model.layers.0.{name}.weight": np.zeros(shape, np.float32) for name, shape in LAYER.items()
    }
    tensors |= {
        "model.embed_tokens.weight": np.zeros((10, 4), np.float32),
        "model.norm.weight": np.zeros(4, np.float32),
    }
    tensors |= {} if tied else {"lm_head.weight": np.zeros((11, 4), np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")

    assert matrices(tmp_path) == {
        "head": head,
        "layers.0.qkv": 32,
        "layers.0.out": 16,
        "layers.0.gate_up": 48,
        "layers.0.down": 24,
    }


def test_a_mean_of_texts_takes_perplexities_by_their_logarithm() -> None:
    texts = [Distance(0.1, 2.0, 1.0, 1.0, 8), Distance(0.3, 8.0, 4.0, 1.0, 8)]
    found = mean(texts)

    assert (found.kl, found.perplexity, found.perplexity_ratio) == pytest.approx((0.2, 4.0, 2.0))
