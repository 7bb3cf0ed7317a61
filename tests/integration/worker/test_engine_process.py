"""The engine process alone, at the end of a socket."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading

import msgspec

from worker import pipe
from worker.engine_process import EngineSetup

SETUP = EngineSetup(backend="echo", threads=1, tokens_per_second=0.0, models=())


def test_an_engine_whose_parent_is_gone_ends_at_once() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # Not the parent's id: as if the parent had died before the engine could ask to die with it.
        command = [sys.executable, "-m", "worker.engine_process", str(theirs.fileno()), "1"]
        done = subprocess.run(command, pass_fds=[theirs.fileno()], timeout=30, check=False)
    assert done.returncode == 0


def test_the_end_of_the_socket_ends_an_engine_that_hangs() -> None:
    """The portable way, without the kernel's help: a process that never steps again still ends."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "worker.engine_process", str(theirs.fileno()), str(os.getpid())]
        child = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    pipe.write(ours, msgspec.json.encode(SETUP))
    with ours.makefile("rb") as stream:
        assert pipe.read(stream) is not None
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGINT)
    closer = threading.Thread(target=ours.close)
    closer.start()
    closer.join(10)
    assert child.wait(timeout=30) == 0
