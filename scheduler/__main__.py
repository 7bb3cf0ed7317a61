"""`python -m scheduler`: one scheduler process, leading or standing by."""

from __future__ import annotations

import logging
import random
import sys

from llmos.clock import SystemClock
from llmos.config import from_command_line
from llmos.lifetime import run_until_signal
from scheduler.config import SchedulerConfig
from scheduler.process import SchedulerProcess


def main() -> int:
    """Entry point of the process. Returns its exit status."""
    config = from_command_line(SchedulerConfig, "scheduler", "python -m scheduler")
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    process = SchedulerProcess(config, SystemClock(), random.SystemRandom())
    return run_until_signal(process.serve)


if __name__ == "__main__":
    sys.exit(main())
