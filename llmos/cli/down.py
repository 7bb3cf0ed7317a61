"""`llmos down`: stop a fleet."""

from __future__ import annotations

from llmos.cli import output
from llmos.cli.flags import DataDir


def down(data_dir: DataDir = None) -> None:
    """Stop the fleet. Nothing happens if none is running."""
    from llmos.config import environment
    from llmos.fleet.shutdown import stop_fleet
    from llmos.fleet.state import last_up, state_home

    folder = data_dir or last_up(state_home(environment()))
    steps = output.Steps()
    try:
        stopped = folder is not None and stop_fleet(folder, steps)
    finally:
        steps.done()
    output.write(f"stopped the fleet in {folder}\n" if stopped else "no fleet is running\n")
