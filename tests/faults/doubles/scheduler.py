"""`python -m tests.faults.doubles.scheduler`: a scheduler that repeats dispatches while the order `again` stands: each
one to five times, in turn.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

from llmos.internal.v1 import request_pb2
from scheduler import __main__ as service
from scheduler.commands import StartAttempt
from scheduler.work_client import WorkLink
from tests.faults.doubles import clock

_again = itertools.cycle(range(1, 6))
_dispatch = WorkLink.dispatch


def _repeated(link: WorkLink, start: StartAttempt, trace: request_pb2.TraceContext | None) -> None:
    ordered = (Path(os.environ["LLMOS_TEST_ORDERS"]) / "again").exists()
    for _ in range(1 + next(_again) if ordered else 1):
        _dispatch(link, start, trace)


if __name__ == "__main__":
    clock.install()
    WorkLink.dispatch = _repeated  # type: ignore[method-assign]
    sys.exit(service.main())
