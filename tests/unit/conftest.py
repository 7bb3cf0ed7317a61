"""Unit tests take milliseconds: what imports have left behind is kept out of the way."""

from __future__ import annotations

import gc
import logging
import os

import pytest
from hypothesis import settings

# How many examples each property is tried on; more where somebody has the time.
settings.register_profile("unit", max_examples=int(os.environ.get("LLMOS_TEST_EXAMPLES", "20")), deadline=None)
settings.load_profile("unit")


def pytest_collection_finish(session: pytest.Session) -> None:
    """The modules live as long as the run; walking through them at every collection costs seconds.

    So does hanging each test's log handlers on the hundreds of loggers that torch keeps from propagating.
    """
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.propagate = True
    gc.collect()
    gc.freeze()
