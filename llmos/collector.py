"""The garbage collector of a process that serves."""

from __future__ import annotations

import gc


def spare_the_collector() -> None:
    """Make it rare, and what exists now none of its business. Once per process, when everything is imported.

    Requests live for seconds and hold no cycles: with the default thresholds, full collections over all live requests
    would stop the loop for milliseconds many times a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
