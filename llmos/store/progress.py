"""How an import tells what it is doing. The command line draws it; programs may ignore it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Stages one after the other; each begins with `stage` and ends with the next one or the end of the import."""

    def stage(self, label: str, total: int | None, *, in_bytes: bool = True) -> None:
        """A new stage of `total` bytes or steps; None if nobody knows."""
        ...

    def advance(self, amount: int) -> None:
        """So many more bytes or steps of the current stage are done."""
        ...


class Silent:
    """Progress that nobody watches."""

    def stage(self, label: str, total: int | None, *, in_bytes: bool = True) -> None:
        del label, total, in_bytes

    def advance(self, amount: int) -> None:
        del amount
