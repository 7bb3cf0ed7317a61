"""In fp32, greedy answers to 50 prompts equal transformers' `generate`, token for token, family by family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engine.tiny import FAMILIES, SLIDING_WINDOW, Transcript, attempt, generate, prompts
from worker.backends.torch import TorchBackend

pytestmark = pytest.mark.torch
TOKENS = 8
# Around a tile, a window, a block, two chunks and four blocks; most of them reach past the sliding window.
EDGES = (1, 7, 8, 9, 23, 24, 25, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 400)
LENGTHS = (*EDGES, *range(30, 300, 9))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(
    family: str, loaded: Callable[..., TorchBackend], written: Callable[[str], tuple[Path, Any]]
) -> None:
    backend, reference = loaded(family), written(family)[1]
    asked = prompts(LENGTHS)
    assert len(asked) == 50
    assert sum(len(prompt) > SLIDING_WINDOW for prompt in asked) >= 40
    for number, prompt in enumerate(asked):
        backend.admit(attempt(str(number), prompt, TOKENS))
    found = Transcript().run(backend)
    assert found.failures == []
    assert [found.tokens[str(number), 0] for number in range(len(asked))] == [
        generate(reference, prompt, TOKENS) for prompt in asked
    ]
