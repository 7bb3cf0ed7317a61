"""The loaded kernels, and which instruction sets to try them with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from worker import kernels
from worker.kernels import Isa, Kernels


@pytest.fixture(scope="session")
def loaded() -> Kernels:
    """The library; where there is no compiler there is nothing to test."""
    if not kernels.available():
        pytest.skip(kernels.reason())
    return kernels.load()


@pytest.fixture(params=list(Isa), ids=lambda isa: isa.name.lower())
def isa(request: pytest.FixtureRequest, loaded: Kernels) -> Isa:
    """Each instruction set that this processor has."""
    if request.param not in loaded.supported():
        pytest.skip("this processor does not have it")
    return Isa(request.param)


@pytest.fixture
def threads(loaded: Kernels) -> Iterator[Kernels]:
    """The kernels, whose number of threads is restored."""
    before = loaded.threads
    yield loaded
    loaded.set_threads(before)
