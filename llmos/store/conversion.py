"""GGUF to safetensors, in a child process: this one never imports torch."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

from llmos.errors import MissingExtra, SourceError
from llmos.store import child
from llmos.store.progress import Progress

CONVERTER_REVISION = 1
"""Part of every conversion's key; raise it when the converter's output changes."""
NEEDED = ("torch", "transformers", "gguf", "accelerate")


def conversion_key(sha256: str) -> str:
    """Import key of a GGUF file with this hash."""
    return f"gguf-{sha256}-r{CONVERTER_REVISION}"


def require_converter() -> None:
    """Raises `MissingExtra` if the child could not start; imports nothing."""
    if any(importlib.util.find_spec(module) is None for module in NEEDED):
        raise MissingExtra("worker", "Converting a GGUF file")


def convert(gguf: Path, out: Path, progress: Progress) -> None:
    """Make the folder `out` from `gguf`. Raises `SourceError` with the converter's last words."""
    require_converter()
    seen = 0

    def show(line: str) -> None:
        nonlocal seen
        if not line.startswith('{"step"'):
            return
        step = json.loads(line)
        if seen == 0:
            progress.stage("converting", step["steps"], in_bytes=False)
        progress.advance(step["step"] - 1 - max(seen - 1, 0))
        seen = step["step"]

    log = out.parent / "convert.log"
    command = [sys.executable, "-m", "worker.convert", "--gguf", str(gguf), "--out", str(out)]
    if child.run(command, log, show) != 0:
        raise SourceError(f"{gguf.name} could not be converted: {child.last_line(log)}")
    progress.advance(1)
