"""What happened, folded into a hash; the lines themselves are kept only if somebody wants to read them."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable


class Trace:
    """Order and times of everything that crossed a wire or reached a client."""

    def __init__(self, clock: Callable[[], float], *, keep: int = 0) -> None:
        self._clock = clock
        self._hash = hashlib.blake2b(digest_size=16)
        self._keep = keep
        self.lines: deque[str] = deque(maxlen=keep or 1)
        self.notes = 0

    @property
    def keeping(self) -> bool:
        """Somebody will read the lines."""
        return self._keep > 0

    def note(self, what: str, data: bytes = b"") -> None:
        """Something happened now."""
        self.notes += 1
        self._hash.update(b"%r|%s|" % (self._clock(), what.encode()))
        self._hash.update(data)

    def say(self, line: str) -> None:
        """A line for people; part of the hash like everything else."""
        self.note(line)
        if self._keep:
            self.lines.append(f"{self._clock() - 1000.0:9.4f}  {line}")

    def digest(self) -> str:
        """Hash of everything so far."""
        return self._hash.hexdigest()
