"""Run a program that dies with its parent: `python launch.py PARENT_PID PROGRAM [ARGUMENT ...]`.

The kernel sends SIGKILL when the parent's thread that started us ends, whatever ended it (`prctl(2)`,
PR_SET_PDEATHSIG; kept across `exec`). Elsewhere than on Linux the program just runs. A file of its own, run by path
with `-I -S`, because it must start in milliseconds, and because running Python between fork and exec is unsafe in a
process with threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
NOT_STARTED = 127


def die_with(parent: int) -> bool:
    """Ask for SIGKILL at the parent's death. False if the parent is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == parent


def main(argv: list[str]) -> int:
    """Become the program. Returns only if it cannot be run."""
    if not die_with(int(argv[1])):
        return NOT_STARTED
    try:
        os.execvp(argv[2], argv[2:])  # noqa: S606 - a launcher becomes its program; no shell is wanted
    except OSError as error:
        sys.stderr.write(f"cannot run {argv[2]}: {error.strerror}\n")
    return NOT_STARTED


if __name__ == "__main__":
    sys.exit(main(sys.argv))
