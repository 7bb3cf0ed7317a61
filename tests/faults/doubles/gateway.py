"""`python -m tests.faults.doubles.gateway`: a gateway whose wall clock jumps on command."""

from __future__ import annotations

import sys

from gateway import __main__ as service
from tests.faults.doubles import clock

if __name__ == "__main__":
    clock.install()
    sys.exit(service.main())
