"""What the step loop needs of a model, whichever way it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from worker.engine.attention import KVRow
from worker.engine.kv import LayerShape
from worker.engine.lora import AdapterHolder


class KVMemory(Protocol):
    """Keys and values in blocks."""

    def slots(self, blocks: Sequence[int]) -> Tensor:
        """Where a sequence that lies in `blocks` has its tokens, in this memory's terms; made once, used each step."""
        ...

    def copy_block(self, source: int, target: int) -> None:
        """Copy one block in every layer."""
        ...


class Paged(Protocol):
    """A decoder and the KV memory that it computes in."""

    @property
    def memory(self) -> KVMemory:
        """Its blocks."""
        ...

    def forward(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        rows: Sequence[KVRow],
        wanted: Sequence[int],
        adapters: Sequence[int] = (),
    ) -> Tensor:
        """One pass over rows of any sequences, one token each; each is written to the last slot that it sees.

        Rows of one sequence share their `slots` tensor. Logits of the rows in `wanted`, float32 [wanted, vocabulary].
        `adapters` are the numbers of the rows' adapters, 0 for none; empty: no row has one.
        """
        ...


class Servable(AdapterHolder, Protocol):
    """A loaded model."""

    @property
    def layers(self) -> Sequence[LayerShape]:
        """What each layer keeps per token."""
        ...

    @property
    def kv_dtype(self) -> torch.dtype:
        """Type of the numbers that it keeps."""
        ...

    @property
    def vocabulary(self) -> int:
        """Width of the logits."""
        ...

    @property
    def context_length(self) -> int | None:
        """Most tokens of prompt and answer together; None: no limit."""
        ...

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""
        ...

    @property
    def workspace_bytes(self) -> int:
        """Memory of a step besides weights and KV blocks."""
        ...

    def with_memory(self, blocks: int) -> Paged:
        """Lay out `blocks` KV blocks for it."""
        ...
