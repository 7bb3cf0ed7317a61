"""Packed tiny models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.integration.engine_fast import tiny
from worker import kernels
from worker.engine.fast import FastDecoder, fast_decoder
from worker.engine.fast.packing import KindOf, all_int8
from worker.kernels import Isa

Packed = Callable[..., FastDecoder]


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """Without a compiler there is no fast path."""
    if not kernels.available():
        pytest.skip(kernels.reason())


@pytest.fixture(autouse=True)
def kernel_threads() -> Iterator[None]:
    """Restore the number of threads."""
    before = kernels.load().threads
    yield
    kernels.load().set_threads(before)


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Any]:
    """transformers' model of a family."""
    return functools.cache(tiny.model)


@pytest.fixture(scope="session")
def packed(reference: Callable[[str], Any]) -> Packed:
    """The fast path's model of a family."""

    @functools.cache
    def of(
        family: str, kv_dtype: torch.dtype = torch.float16, isa: Isa | None = None, kind_of: KindOf = all_int8
    ) -> FastDecoder:
        return fast_decoder(reference(family), kv_dtype=kv_dtype, isa=isa, kind_of=kind_of)

    return of
