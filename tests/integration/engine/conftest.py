"""Loaded tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.engine import tiny
from worker.backend import ModelSpec
from worker.backends.torch import TorchBackend

BUDGET = 64 << 20


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[None]:
    """Restore the number of threads, which is the process's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Folder and transformers' model of a family; written once."""
    found: dict[str, tuple[Path, Any]] = {}

    def of(family: str) -> tuple[Path, Any]:
        if family not in found:
            folder = tmp_path_factory.mktemp(family)
            found[family] = folder, tiny.write(family, folder)
        return found[family]

    return of


@pytest.fixture
def loaded(written: Callable[[str], tuple[Path, Any]]) -> Callable[..., TorchBackend]:
    """A backend that has loaded a family as `tiny`."""

    def of(family: str, threads: int = 1, budget: int = BUDGET) -> TorchBackend:
        backend = TorchBackend(threads=threads, precision="fp32")
        backend.load(ModelSpec("tiny", "1", written(family)[0]), budget)
        return backend

    return of
