"""LoRA adapters of a loaded model: their matrices, read from a folder, and the numbers by which rows name them.

y = W x + B (A x), with the scale inside B. Source: LoRA (Hu et al., 2021).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as nnf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llmos.errors import SourceError, Unavailable
from llmos.store import adapter as files

RANK_MULTIPLE = 8
"""Ranks are padded with zeros to a multiple of this, so that the shapes of all adapters are few."""
NONE = 0
"""Number of a row without an adapter."""


@dataclass(frozen=True, slots=True)
class Matrices:
    """The pair of one projection, float32: A [rank, inputs] and B [outputs, rank]."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True)
class Adapter:
    """Matrices by layer and projection (`llmos.store.adapter.TARGETS`), all of one padded rank."""

    rank: int
    pairs: Mapping[tuple[int, str], Matrices]


def read_adapter(folder: Path) -> Adapter:
    """PEFT's folder as fp32 matrices on the CPU. Raises SourceError if it is no adapter that llmos runs."""
    config = files.read_config(folder)
    try:
        tensors = load_file(folder / files.WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise SourceError("The adapter's weights cannot be read.") from error
    found: dict[tuple[int, str], dict[bool, Tensor]] = {}
    for name, tensor in tensors.items():
        where = files.place(name)
        found.setdefault((where.layer, where.target), {})[where.down] = tensor.float()
    if any(len(pair) < 2 or pair[True].shape[0] != pair[False].shape[1] for pair in found.values()):
        raise SourceError("The adapter's matrices are no complete pairs.")
    return make_adapter({where: (pair[True], pair[False]) for where, pair in found.items()}, config.scale)


def make_adapter(pairs: Mapping[tuple[int, str], tuple[Tensor, Tensor]], scale: float) -> Adapter:
    """From A [rank, inputs] and B [outputs, rank] by layer and projection."""
    rank = max((down.shape[0] for down, _ in pairs.values()), default=1)
    rank += -rank % RANK_MULTIPLE
    return Adapter(rank, {where: _padded(down, up * scale, rank) for where, (down, up) in pairs.items()})


def _padded(down: Tensor, up: Tensor, rank: int) -> Matrices:
    missing = rank - down.shape[0]
    return Matrices(nnf.pad(down, (0, 0, 0, missing)).contiguous(), nnf.pad(up, (0, missing)).contiguous())


class AdapterHolder(Protocol):
    """A loaded model that can run rows with adapters."""

    def put_adapter(self, number: int, adapter: Adapter) -> None:
        """Take an adapter over as `number`, which is free. Raises SourceError if it does not fit the model."""
        ...

    def drop_adapter(self, number: int) -> None:
        """Forget it; no row names it any more."""
        ...


class Adapters:
    """Names of a model's loaded adapters, and their numbers: from 1 on, those of dropped ones again."""

    def __init__(self, holder: AdapterHolder) -> None:
        self._holder = holder
        self._numbers: dict[str, int] = {}

    def load(self, name: str, adapter: Adapter) -> None:
        """Make it usable under `name`, which is not loaded. Raises SourceError if it does not fit the model."""
        used = set(self._numbers.values())
        number = next(number for number in range(1, len(used) + 2) if number not in used)
        with torch.inference_mode():
            self._holder.put_adapter(number, adapter)
        self._numbers[name] = number

    def drop(self, name: str) -> None:
        """Forget an adapter; an unknown name is ignored."""
        number = self._numbers.pop(name, NONE)
        if number:
            self._holder.drop_adapter(number)

    def check(self, name: str) -> None:
        """Raises Unavailable unless `name` is loaded or empty."""
        if name and name not in self._numbers:
            raise Unavailable(f"The adapter {name} is not loaded here.")

    def rows(self, names: Iterable[str]) -> list[int]:
        """Numbers of the rows' adapters; empty if no row has one."""
        if not self._numbers:
            return []
        numbers = [self._numbers[name] if name else NONE for name in names]
        return numbers if any(numbers) else []
