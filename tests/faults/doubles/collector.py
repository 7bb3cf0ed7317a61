"""`python -m tests.faults.doubles.collector`: a trace collector in a process of its own, which can be frozen."""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path

from llmos.ready import write_ready
from tests.fakes.collector import Collector

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ready-file", type=Path)
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: over.set())
    with Collector(options.port):
        write_ready(options.ready_file, "collector", port=options.port)
        over.wait()
