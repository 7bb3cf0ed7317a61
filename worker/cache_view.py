"""What a scheduler is told of this worker's prefix caches: all of it on a new stream, then what changes. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from llmos.internal.v1 import work_pb2

HASHES_PER_FRAME = 65_536
"""512 KiB of a frame."""


class CacheView:
    """Mirrors the caches of the engine's models by hash, and what of them the present stream has not been told.

    Changes that cancel each other are never told, so memory is bounded by the caches, however long nobody listens.
    """

    def __init__(self) -> None:
        self._held: dict[str, set[int]] = {}
        self._untold: dict[str, dict[int, bool]] = {}
        self._numbers: dict[str, int] = {}

    def attach(self) -> None:
        """A new stream begins; it knows nothing."""
        self._numbers.clear()
        self._untold = {model: dict.fromkeys(hashes, True) for model, hashes in self._held.items()}

    def resend(self, model: str) -> None:
        """The scheduler has missed a change of this model: name all of it again, from number 1."""
        self._numbers.pop(model, None)
        self._untold[model] = dict.fromkeys(self._held.get(model, ()), True)
        if not self._untold[model]:
            del self._untold[model]

    def change(self, change: work_pb2.CacheChange) -> None:
        """The engine's word."""
        if change.number == 1:
            self.forget(change.model)  # a cache that was just laid out
        held = self._held.setdefault(change.model, set())
        for prefix_hash in change.removed:
            held.discard(prefix_hash)
            self._note(change.model, prefix_hash, stored=False)
        for prefix_hash in change.stored:
            held.add(prefix_hash)
            self._note(change.model, prefix_hash, stored=True)

    def forget(self, model: str) -> None:
        """A model's cache is gone."""
        for prefix_hash in self._held.pop(model, ()):
            self._note(model, prefix_hash, stored=False)

    def forget_all(self) -> None:
        """The engine is gone."""
        for model in list(self._held):
            self.forget(model)

    def take(self) -> Iterable[work_pb2.CacheChange]:
        """What the stream has not been told, as far as it fits a frame."""
        room = HASHES_PER_FRAME
        for model in list(self._untold):
            untold = self._untold[model]
            told = {prefix_hash: untold.pop(prefix_hash) for prefix_hash in list(itertools.islice(untold, room))}
            if not untold:
                del self._untold[model]
            if told:
                room -= len(told)
                yield self._message(model, told)

    def _message(self, model: str, told: dict[int, bool]) -> work_pb2.CacheChange:
        number = self._numbers[model] = self._numbers.get(model, 0) + 1
        return work_pb2.CacheChange(
            model=model,
            number=number,
            stored=(key for key, stored in told.items() if stored),
            removed=(key for key, stored in told.items() if not stored),
        )

    def _note(self, model: str, prefix_hash: int, *, stored: bool) -> None:
        untold = self._untold.setdefault(model, {})
        if untold.pop(prefix_hash, stored) == stored:
            untold[prefix_hash] = stored
