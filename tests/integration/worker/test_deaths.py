"""Engine and RPC process killed, stopped, drained."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import psutil

from llmos.errors import Unavailable
from llmos.internal.v1 import work_pb2
from llmos.store import Store, import_model
from llmos.v1 import fleet_pb2
from tests.fakes.models import write_model
from tests.integration.worker.conftest import StartWorker
from tests.integration.worker.processes import WorkerProcess, gone, until
from tests.integration.worker.scheduler_client import SchedulerClient, cancel, dispatch, expected


async def test_a_killed_engine_is_reported_and_started_again(worker: WorkerProcess) -> None:
    async with SchedulerClient(worker.address) as scheduler:
        await scheduler.load()
        first_engine = worker.engine_pid
        scheduler.send(dispatch("a", max_tokens=4000), dispatch("b", max_tokens=4000))
        await scheduler.until(lambda: len(scheduler.tokens["b", 0]) > 2)
        step = scheduler.frames[-1].step
        os.kill(first_engine, signal.SIGKILL)
        await scheduler.until(lambda: len(scheduler.failures) == 2)
        assert {(failure.request_id, failure.code) for failure in scheduler.failures} == {
            ("a", "engine_lost"),
            ("b", "engine_lost"),
        }
        received = list(scheduler.tokens["a", 0])
        assert received == expected(len(received))
        # The model comes back by itself: nobody orders it again, nobody registers again.
        await scheduler.until(lambda: _loaded_again(scheduler))
        assert gone(first_engine)
        assert worker.engine_pid != first_engine
        scheduler.send(dispatch("a", attempt=2, max_tokens=len(received) + 5, resume={0: received}))
        assert await scheduler.done("a") == [expected(len(received) + 5)]
        assert scheduler.frames[-1].step > step
        assert scheduler.error is None


def _loaded_again(scheduler: SchedulerClient) -> bool:
    states = [model.state for frame in scheduler.frames for model in frame.models]
    loading = fleet_pb2.MODEL_STATE_LOADING
    return states.count(loading) >= 2 and states[-1] == fleet_pb2.MODEL_STATE_LOADED


async def test_the_engine_dies_with_the_rpc_process(worker: WorkerProcess) -> None:
    async with SchedulerClient(worker.address) as scheduler:
        await scheduler.load()
        scheduler.send(dispatch("a", max_tokens=4000))
        await scheduler.until(lambda: len(scheduler.tokens["a", 0]) > 2)
        engine = worker.engine_pid
        worker.signal(signal.SIGKILL)
        assert await worker.exit_status() == -signal.SIGKILL
        await until(lambda: gone(engine))


async def test_even_a_stopped_engine_dies_with_the_rpc_process(worker: WorkerProcess) -> None:
    engine = worker.engine_pid
    os.kill(engine, signal.SIGSTOP)
    worker.signal(signal.SIGKILL)
    await until(lambda: gone(engine))


async def test_sigterm_finishes_what_runs_and_takes_nothing_new(worker: WorkerProcess) -> None:
    async with SchedulerClient(worker.address) as scheduler:
        await scheduler.load()
        engine = worker.engine_pid
        scheduler.send(dispatch("a", max_tokens=60))
        await scheduler.until(lambda: len(scheduler.tokens["a", 0]) > 2)
        worker.signal(signal.SIGTERM)
        await scheduler.until(lambda: scheduler.frames[-1].draining)
        scheduler.send(dispatch("late"))
        await scheduler.until(lambda: len(scheduler.failures) == 1)
        assert (scheduler.failures[0].request_id, scheduler.failures[0].code) == ("late", "attempt_lost")
        assert await scheduler.done("a") == [expected(60)]
        assert await worker.exit_status() == 0
        assert gone(engine)


async def test_sigterm_leaves_what_is_not_done_in_time(start_worker: StartWorker) -> None:
    flags = ("--drain-s", "0.3", "--echo-tokens-per-second", "20")
    async with start_worker(*flags) as worker, SchedulerClient(worker.address) as scheduler:
        await scheduler.load()
        scheduler.send(dispatch("a", max_tokens=4000))
        await scheduler.until(lambda: len(scheduler.tokens["a", 0]) > 1)
        worker.signal(signal.SIGTERM)
        assert isinstance(await scheduler.ended(), Unavailable)
        assert await worker.exit_status() == 0
        assert len(scheduler.tokens["a", 0]) < 4000


async def test_sigterm_to_an_idle_worker_ends_it_without_a_scheduler(worker: WorkerProcess) -> None:
    worker.signal(signal.SIGTERM)
    assert await worker.exit_status() == 0


async def test_a_drain_order_empties_without_ending(worker: WorkerProcess) -> None:
    async with SchedulerClient(worker.address) as scheduler:
        await scheduler.load()
        scheduler.send(dispatch("a"), work_pb2.Command(drain=work_pb2.Drain()), dispatch("late"))
        assert await scheduler.done("a") == [expected(16)]
        assert [failure.request_id for failure in scheduler.failures] == ["late"]
        assert scheduler.frames[-1].draining
        assert worker.process.returncode is None


async def test_a_model_that_does_not_fit_fails_with_a_reason(start_worker: StartWorker) -> None:
    flags = ("--model", "small,big=40GiB,tight=1GiB", "--memory-limit", str(8 * 2**30))
    async with start_worker(*flags) as worker, SchedulerClient(worker.address) as scheduler:
        assert scheduler.models["big"].state == fleet_pb2.MODEL_STATE_UNFIT
        assert "40.0 GiB" in scheduler.models["big"].detail
        await scheduler.load("small")
        order = work_pb2.LoadModel(model="tight", memory_budget_bytes=2**20)
        scheduler.send(work_pb2.Command(load=order))
        await scheduler.until(lambda: scheduler.models["tight"].state == fleet_pb2.MODEL_STATE_FAILED)
        assert "tight" in scheduler.models["tight"].detail
        scheduler.send(dispatch("a", model="small"))
        assert await scheduler.done("a") == [expected(16)]


async def failing_worker(*flags: str, **environment: str) -> tuple[int | None, str]:
    """Exit status and log of a worker that cannot start."""
    command = ["-m", "worker", "--backend", "torch", "--etcd-endpoints", "", *flags]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stderr=asyncio.subprocess.PIPE, env={**os.environ, **environment}
    )
    async with asyncio.timeout(60):
        _, log = await process.communicate()
    assert b"Traceback" not in log
    return process.returncode, log.decode()


async def test_a_model_that_the_store_lacks_ends_the_worker(tmp_path: Path) -> None:
    status, log = await failing_worker("--model", "no-such-model", "--store", str(tmp_path))
    assert status == 2
    assert "no-such-model" in log


async def test_without_the_worker_extra_the_worker_says_what_to_install(tmp_path: Path) -> None:
    import_model(Store(tmp_path / "store"), str(write_model(tmp_path / "source")), name="tiny", environ={})
    shadow = tmp_path / "shadow" / "torch.py"
    shadow.parent.mkdir()
    shadow.write_text("raise ModuleNotFoundError('No module named torch', name='torch')\n")
    path = os.pathsep.join([str(shadow.parent), *sys.path])
    status, log = await failing_worker("--model", "tiny", "--store", str(tmp_path / "store"), PYTHONPATH=path)
    assert status == 2
    assert "pip install 'llmos[worker]'" in log


async def test_a_cancel_storm_leaves_nothing_behind(start_worker: StartWorker) -> None:
    async with start_worker("--echo-tokens-per-second", "200") as worker, SchedulerClient(worker.address) as scheduler:
        await scheduler.load()
        total = scheduler.models["echo"].total_blocks
        descriptors = psutil.Process(worker.process.pid).num_fds()
        for number in range(300):
            scheduler.send(dispatch(f"r{number}", max_tokens=4000))
            scheduler.send(cancel(f"r{number}"))
        scheduler.send(dispatch("last", max_tokens=5))
        assert await scheduler.done("last") == [expected(5)]
        await scheduler.until(lambda: scheduler.models["echo"].free_blocks == total)
        assert psutil.Process(worker.process.pid).num_fds() == descriptors
