"""The child's half of the line protocol. Standard library only.

Requests are `{"call": NAME, ...arguments}`; an answer is `{"result": {...}}` or `{"error": "one line"}`. Whatever else
the engine prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, Protocol

Tokens = list[int]


class Engine(Protocol):
    """What every side does. Decoding is greedy and never ends early."""

    @property
    def load(self) -> Callable[..., dict[str, Any]]:
        """`load(model, threads, ...)`: load a file or folder; says its `version` and what else describes it."""
        ...

    def decode(self, prompts: list[Tokens], steps: int) -> dict[str, float]:
        """Prefill the prompts, then advance all of them together by `steps` tokens; only that is timed.

        `tokens` and `seconds`.
        """
        ...

    def prefill(self, prompt: Tokens) -> dict[str, float]:
        """Compute a prompt up to its first output token: `tokens` of the prompt and `seconds`."""
        ...

    def logits(self, tokens: Tokens, path: str) -> dict[str, Any]:
        """Write the logits at every position to `path` as .npy: float32 [tokens, vocabulary]."""
        ...


def serve(engine: Engine) -> None:
    """Answer calls from standard input until it ends. A side may have calls besides those of `Engine`."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(_answer(engine, json.loads(line))) + "\n")


def _answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    name = request.pop("call")
    try:
        return {"result": getattr(engine, name)(**request)}
    except Exception as error:  # the parent raises it; the log has the trace
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:500]}
