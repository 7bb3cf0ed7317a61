"""`python -m tests.faults.doubles.worker`: a worker whose engine is `tests.faults.doubles.engine`."""

from __future__ import annotations

import sys

from tests.faults.doubles import clock
from worker import __main__ as service
from worker import engine_child

if __name__ == "__main__":
    clock.install()
    engine_child.ENGINE = "tests.faults.doubles.engine"
    sys.exit(service.main())
