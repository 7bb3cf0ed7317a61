"""A model whose logits are a hash of what it finds in its KV memory: whatever is misplaced there changes a token."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from worker.engine.attention import KVRow
from worker.engine.kv import BLOCK_TOKENS, LayerShape
from worker.engine.lora import Adapter

VOCABULARY = 24
END = 0
_HABIT = 6.0
"""Added to the logit of the token that followed the last two before: text repeats itself, as drafting needs."""


class HashMemory:
    """Implements `worker.engine.paged.KVMemory`; a slot holds a token and the rank of its row's adapter."""

    def __init__(self, blocks: int) -> None:
        self.cells = torch.full((blocks, BLOCK_TOKENS, 2), -1)

    def slots(self, blocks: Sequence[int]) -> Tensor:
        """Places in order of position."""
        return (torch.tensor(list(blocks), dtype=torch.int64)[:, None] * BLOCK_TOKENS + torch.arange(64)).flatten()

    def copy_block(self, source: int, target: int) -> None:
        """Copy one block."""
        self.cells[target] = self.cells[source]


class HashModel:
    """Implements `worker.engine.paged.Servable`."""

    layers = (LayerShape(1, 16, 16),)
    kv_dtype = torch.float32
    vocabulary = VOCABULARY
    context_length = None
    end_tokens = frozenset({END})
    weight_bytes = 0
    workspace_bytes = 0

    def __init__(self) -> None:
        self.ranks = {0: 0}
        """By number of the adapter."""

    def with_memory(self, blocks: int) -> PagedHashModel:
        """See `Servable`."""
        return PagedHashModel(self, HashMemory(blocks))

    def put_adapter(self, number: int, adapter: Adapter) -> None:
        """See `AdapterHolder`."""
        self.ranks[number] = adapter.rank

    def drop_adapter(self, number: int) -> None:
        """See `AdapterHolder`."""
        del self.ranks[number]


class PagedHashModel:
    """Implements `worker.engine.paged.Paged`."""

    def __init__(self, model: HashModel, memory: HashMemory) -> None:
        self._model = model
        self.memory = memory

    def forward(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        rows: Sequence[KVRow],
        wanted: Sequence[int],
        adapters: Sequence[int] = (),
    ) -> Tensor:
        """See `Paged`. Asserts that no slot is written twice, nor read before it was written."""
        cells = self.memory.cells.flatten(0, 1)
        targets = [int(row.slots[position]) for row, position in zip(rows, positions, strict=True)]
        assert len(set(targets)) == len(targets)
        ranks = [self._model.ranks[number] for number in adapters or [0] * len(tokens)]
        cells[targets] = torch.tensor([tokens, ranks]).T
        found = [_read(cells[rows[number].slots[: rows[number].length]]) for number in wanted]
        return torch.stack(found) if found else torch.empty(0, VOCABULARY)


def _read(seen: Tensor) -> Tensor:
    assert int(seen.min()) >= 0
    return logits(seen[:, 0].tolist(), seen[:, 1].tolist())


def logits(tokens: list[int], ranks: list[int]) -> Tensor:
    """After these tokens, each computed with the adapter of that rank: float32 [VOCABULARY]."""
    digest = hashlib.blake2b(bytes([*tokens, *ranks]), digest_size=8).digest()
    found = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1))
    last = next((at for at in range(len(tokens) - 2, 1, -1) if tokens[at - 2 : at] == tokens[-2:]), None)
    if last is not None and digest[0] < 200:
        found[tokens[last]] += _HABIT
    found[END] -= 1.5
    return found
