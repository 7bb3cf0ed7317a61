from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmos.children import start

WAITS = [sys.executable, "-c", "import time; time.sleep(600)"]

FORKS_BADLY = """
import asyncio, os, sys, threading, uvloop
from llmos.children import start
os.register_at_fork(after_in_child=threading.Event().wait)
async def main():
    print(await start([sys.executable, "-c", "raise SystemExit(7)"]).wait())
with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(main())
"""


async def test_exit_status_and_output(tmp_path: Path) -> None:
    with (tmp_path / "log").open("xb") as output:
        child = start(
            [sys.executable, "-c", "import sys; print('out'); sys.stderr.write('err'); sys.exit(3)"], output=output
        )
    assert await child.wait() == 3
    assert child.returncode == 3
    assert sorted((tmp_path / "log").read_text().split()) == ["err", "out"]


async def test_several_wait_one_gives_up_the_others_hear_of_the_end() -> None:
    child = start(WAITS)
    waiting = [asyncio.create_task(child.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    assert child.returncode is None
    child.kill()
    async with asyncio.timeout(20):
        found = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert found[1:] == [-signal.SIGKILL, -signal.SIGKILL]
    child.kill()  # of no effect


async def test_it_inherits_what_it_is_given_and_may_lead_a_session() -> None:
    ours, theirs = os.pipe()
    program = f"import os; os.write({theirs}, str(os.getsid(0) == os.getpid()).encode())"
    child = start([sys.executable, "-c", program], keep=[theirs], new_session=True)
    os.close(theirs)
    assert await child.wait() == 0
    with os.fdopen(ours) as pipe:
        assert pipe.read() == "True"


async def test_a_program_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        start(["/nowhere/at-all"])


def test_nothing_of_ours_runs_between_fork_and_exec() -> None:
    """What runs there may wait for ever for a lock of a thread that the child does not have."""
    done = subprocess.run([sys.executable, "-c", FORKS_BADLY], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.stderr) == ("7", "")
