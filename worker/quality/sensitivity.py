"""What int8 costs in each matrix of a model, estimated for all of them from one pass forwards and one backwards.

For small changes, the divergence of the output is a quadratic form in the Fisher information (Martens,
arXiv:1412.1193). With labels y drawn from the model itself, an error e_t in a matrix's output at position t costs
about (g_t . e_t)^2 / 2 nats, where g_t is the gradient of log p(y) there. Errors are taken as independent between
positions and matrices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from llmos.store.precision import HEAD
from worker.engine.grouped import restored
from worker.engine.planned import matrices
from worker.quality.search import Sensitivity

_SEED = 0


def sensitivities(model: Any, text: Sequence[int]) -> dict[str, Sensitivity]:
    """Matrix to what int8 costs in it, for transformers' model in fp32 with ordinary `nn.Linear` layers.

    The embedding counts towards the head. The same for the same model, text and torch.
    """
    ids, start = torch.tensor([list(text)]), _Start()
    watches = [_Watch(matrix, module) for matrix, _, module in matrices(model)]
    handles = [model.get_input_embeddings().register_forward_hook(start)]
    handles += [handle for watch in watches for handle in watch.handles]
    try:
        _backward(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    costs: dict[str, float] = defaultdict(float)
    numbers: dict[str, int] = defaultdict(int)
    costs[HEAD] = start.cost(model.get_input_embeddings(), ids)
    for watch in watches:
        costs[watch.matrix] += watch.cost
        numbers[watch.matrix] += watch.module.weight.numel()
    return {matrix: Sensitivity(costs[matrix], count) for matrix, count in numbers.items()}


@torch.enable_grad()
def _backward(model: Any, ids: Tensor) -> None:
    logits = model(input_ids=ids, use_cache=False).logits[0]
    generator = torch.Generator().manual_seed(_SEED)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    torch.autograd.backward(nnf.cross_entropy(logits, labels, reduction="sum"))


def _cost(gradient: Tensor, error: Tensor) -> float:
    return float((gradient * error).sum(-1).square().sum()) / 2


class _Start:
    """Lets gradients begin at the embedding's output: the weights need none."""

    def __init__(self) -> None:
        self._out = torch.empty(0)

    def __call__(self, _module: nn.Module, _inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        self._out = out.detach().requires_grad_()
        return self._out

    @torch.no_grad()
    def cost(self, embedding: Any, ids: Tensor) -> float:
        """What rounding the embedding would cost, after the pass backwards."""
        gradient, weight = self._out.grad, embedding.weight
        error = nnf.embedding(ids, restored(weight) - weight) * getattr(embedding, "embed_scale", 1.0)
        return 0.0 if gradient is None else _cost(gradient, error)


class _Watch:
    """Adds up what rounding a linear module's weights would cost, once the gradient of its output is known."""

    def __init__(self, matrix: str, module: Any) -> None:
        self.matrix, self.module, self.cost = matrix, module, 0.0
        self.handles = [
            module.register_forward_pre_hook(self._forward),
            module.register_full_backward_pre_hook(self._backward),
        ]
        self._source = torch.empty(0)

    def _forward(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._source = inputs[0].detach()

    @torch.no_grad()
    def _backward(self, _module: nn.Module, gradients: Sequence[Tensor]) -> None:
        weight = self.module.weight
        self.cost += _cost(gradients[0], self._source @ (restored(weight) - weight).t())
