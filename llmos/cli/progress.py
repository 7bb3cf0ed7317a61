"""Progress of an import: bars on a terminal, plain lines elsewhere. On stderr, so that stdout stays the result."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmos.cli import output

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from llmos.store.progress import Progress


@contextlib.contextmanager
def shown() -> Iterator[Progress]:
    """Progress for whoever sits there; what was drawn is final when the context ends."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
    with Progress(*columns, TimeElapsedColumn(), console=output.console(stderr=True)) as bars:
        drawn = Drawn(bars)
        yield drawn
        drawn.finish()


class Lines:
    """One line per stage, and one at every quarter of a long one."""

    def __init__(self) -> None:
        self._label = ""
        self._total: int | None = None
        self._done = 0
        self._in_bytes = True

    def stage(self, label: str, total: int | None, *, in_bytes: bool = True) -> None:
        self._label, self._total, self._done, self._in_bytes = label, total, 0, in_bytes
        size = f" ({output.bytes_text(total)})" if total and in_bytes else ""
        output.note(f"{label}{size}")

    def advance(self, amount: int) -> None:
        if not self._total:
            return
        before = self._done * 4 // self._total
        self._done += amount
        after = self._done * 4 // self._total
        if after > before and self._done < self._total:
            output.note(f"{self._label}: {100 * self._done // self._total} %")


class Drawn:
    """One rich bar per stage; a pulse while its length is unknown."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task: TaskID | None = None
        self._label = ""
        self._total: int | None = None
        self._done = 0
        self._in_bytes = True

    def stage(self, label: str, total: int | None, *, in_bytes: bool = True) -> None:
        self.finish(replaced_by=label)
        self._label, self._total, self._done, self._in_bytes = label, total, 0, in_bytes
        self._task = self._bars.add_task(label, total=total, amount=self._amount())

    def advance(self, amount: int) -> None:
        self._done += amount
        if self._task is not None:
            self._bars.update(self._task, completed=self._done, amount=self._amount())

    def finish(self, replaced_by: str = "") -> None:
        """Fill the current bar; one that a stage of the same label goes on with disappears."""
        if self._task is None:
            return
        if self._label == replaced_by:
            self._bars.remove_task(self._task)
        else:
            full = self._total or 1
            self._bars.update(self._task, total=full, completed=full)
        self._task = None

    def _amount(self) -> str:
        if self._total is None:
            return ""
        if self._in_bytes:
            return f"{output.bytes_text(self._done)} of {output.bytes_text(self._total)}"
        return f"{self._done} of {self._total}"
