"""Stand-ins around the model store: a converter that needs no torch, and a witness of progress."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llmos.store.progress import Progress
from tests.fakes.models import write_model


class Converter:
    """Takes the place of the child process: remembers what it converted and writes a tiny model."""

    def __init__(self, during: Callable[[], None] = lambda: None) -> None:
        self.converted: list[bytes] = []
        self._during = during

    @classmethod
    def installed(cls, monkeypatch: pytest.MonkeyPatch, during: Callable[[], None] = lambda: None) -> Converter:
        """A converter in the importer's hands; `during` runs in the middle of every conversion."""
        converter = cls(during)
        monkeypatch.setattr("llmos.store.importer.convert", converter)
        monkeypatch.setattr("llmos.store.importer.require_converter", lambda: None)
        return converter

    def __call__(self, gguf: Path, out: Path, progress: Progress) -> None:
        progress.stage("converting", 1, in_bytes=False)
        self.converted.append(gguf.read_bytes())
        self._during()
        write_model(out)
        progress.advance(1)


class Recorder:
    """Remembers every stage and how much of it was done."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int | None]] = []
        self.done: list[int] = []

    def stage(self, label: str, total: int | None, *, in_bytes: bool = True) -> None:
        del in_bytes
        self.stages.append((label, total))
        self.done.append(0)

    def advance(self, amount: int) -> None:
        self.done[-1] += amount

    def complete(self) -> bool:
        """Whether every stage of known length was done exactly."""
        return all(total in (None, done) for (_, total), done in zip(self.stages, self.done, strict=True))
