"""Greedy answers equal transformers' `generate`, token for token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engine.tiny import FAMILIES, Transcript, attempt, generate, prompts
from worker.backends.torch import TorchBackend

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(
    family: str, loaded: Callable[..., TorchBackend], written: Callable[[str], tuple[Path, Any]]
) -> None:
    backend, reference = loaded(family), written(family)[1]
    # Around a tile, a block, two chunks, and past the sliding window.
    asked = prompts((1, 7, 8, 9, 63, 64, 65, 128, 129, 200))
    for number, prompt in enumerate(asked):
        backend.admit(attempt(str(number), prompt, 24))
    found = Transcript().run(backend)
    assert found.failures == []
    assert [found.tokens[str(number), 0] for number in range(len(asked))] == [
        generate(reference, prompt, 24) for prompt in asked
    ]
