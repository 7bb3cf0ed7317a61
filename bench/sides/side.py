"""The parent's half: start a side's process, call it, end it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bench.peers import places
from bench.sides.calls import Tokens


class SideError(Exception):
    """A side's process failed; the text names it, and its last words."""


class Side:
    """One engine in a process of its own. Calls wait for the answer; a side that died raises SideError."""

    def __init__(self, name: str, command: Sequence[str], environ: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.about: dict[str, Any] = {}
        """What `load` answered."""
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by `close`
        variables = {**os.environ, "PYTHONPATH": str(places.ROOT), **(environ or {})}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
            env=variables,
            cwd=places.ROOT,
        )

    def load(self, model: Path, threads: int, **options: Any) -> Self:
        """See `Engine.load`; the answer is in `about`."""
        self.about = self._call("load", model=str(model), threads=threads, **options)
        return self

    def decode(self, prompts: Sequence[Tokens], steps: int, **options: Any) -> float:
        """Tokens per second of all sequences together."""
        done = self._call("decode", prompts=list(prompts), steps=steps, **options)
        return float(done["tokens"] / done["seconds"])

    def prefill(self, prompt: Tokens) -> float:
        """Prompt tokens per second."""
        done = self._call("prefill", prompt=prompt)
        return float(done["tokens"] / done["seconds"])

    def logits(self, tokens: Tokens) -> NDArray[np.float32]:
        """Logits after each token, float32 [tokens, vocabulary]; in memory."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "logits.npy"
            self._call("logits", tokens=tokens, path=str(path))
            found: NDArray[np.float32] = np.load(path)
            return found

    def call(self, name: str, **arguments: Any) -> dict[str, Any]:
        """A call that only this side has."""
        return self._call(name, **arguments)

    def close(self) -> None:
        """End the process."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, call: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SideError(f"{self.name} ended during '{call}': {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SideError(f"{self.name} failed in '{call}': {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _last_words(self) -> str:
        self._log.seek(0)
        return " / ".join(self._log.read().splitlines()[-5:])[-1000:]
