"""How commands speak: tables for people, JSON for programs, one line for an error. Results go to stdout, the rest to
stderr."""

from __future__ import annotations

import contextlib
import json
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_KEPT_CONTROLS = frozenset("\n\t")


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str) -> None:
    """A table for people; `empty` in its place if there are no rows."""
    if not rows:
        write(f"{empty}\n")
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console().print(table)


def console(*, stderr: bool = False) -> Console:
    """A rich console on stdout or stderr; plain when that is no terminal. Wide enough for whole ids in a pipe."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, highlight=False, width=None if stream.isatty() else 200)


def write(text: str) -> None:
    """Text on stdout at once. On a terminal without control characters: text of a model must not steer it."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def note(line: str) -> None:
    """A line on stderr."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def error(message: str) -> None:
    """An error in one line on stderr."""
    note(f"llmos: {printable(' '.join(message.split()))}")


def printable(text: str) -> str:
    """`text` without control characters other than newline and tab."""
    return "".join(char for char in text if char in _KEPT_CONTROLS or unicodedata.category(char) != "Cc")


def enum_name(enum: Any, value: int) -> str:
    """A protobuf enum's value in lower case without its prefix: NODE_ROLE_WORKER becomes `worker`."""
    try:
        name: str = enum.Name(value)
    except ValueError:
        return "unknown"
    return name.removeprefix(_prefix(enum)).lower()


def _prefix(enum: Any) -> str:
    name = str(enum.DESCRIPTOR.name)
    words = "".join(f"_{char}" if char.isupper() else char for char in name).strip("_")
    return f"{words.upper()}_"


def bytes_text(count: int) -> str:
    """`count` bytes in the largest binary unit that keeps it at least 1."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def seconds_text(seconds: float) -> str:
    """A duration with the unit that fits it."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


class Steps:
    """Shows what is going on while a person waits: a spinner on a terminal, a line per step elsewhere."""

    def __init__(self) -> None:
        self._status: Any = None

    def __call__(self, step: str) -> None:
        if not sys.stderr.isatty():
            note(f"{step} ...")
        elif self._status is None:
            self._status = console(stderr=True).status(step)
            self._status.start()
        else:
            self._status.update(step)

    def done(self) -> None:
        """Take the spinner away; idempotent."""
        if self._status is not None:
            self._status.stop()
            self._status = None


@contextlib.contextmanager
def waiting(what: str) -> Iterator[Callable[[], None]]:
    """A spinner on a terminal, nothing elsewhere. Ends with the context, or when the function it yields is called."""
    if not (sys.stderr.isatty() and sys.stdout.isatty()):
        yield lambda: None
        return
    steps = Steps()
    steps(what)
    try:
        yield steps.done
    finally:
        steps.done()


Report = Callable[[str], None]
