"""Child processes of an import: their lines are read as they come, and they end with the importer."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

KILL_AFTER_S = 5.0


def run(command: Sequence[str], log: Path, on_line: Callable[[str], None]) -> int:
    """Run `command` until it ends and return its exit status; standard error goes to `log`.

    There is no deadline: how long a download or a conversion takes is not known. Leaving early, by Ctrl-C or an error
    in `on_line`, ends the child.
    """
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace"
        ) as child,
    ):
        try:
            for line in child.stdout or ():
                on_line(line.rstrip("\n"))
            return child.wait()
        finally:
            _end(child)


def last_line(log: Path) -> str:
    """The last line a child wrote to its log that says something, shortened."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _end(child: subprocess.Popen[str]) -> None:
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(KILL_AFTER_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
