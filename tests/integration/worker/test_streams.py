"""A real worker process, driven over its Work stream."""

from __future__ import annotations

import hashlib
import os
import signal
import time

import grpc
import pytest

from llmos.errors import FleetError, InvalidRequest, NotFound, StaleTerm
from llmos.internal.v1 import work_pb2, work_pb2_grpc
from llmos.rpc import error_from_rpc, open_channel
from llmos.v1 import fleet_pb2, inference_pb2
from tests.integration.worker.conftest import StartWorker
from tests.integration.worker.processes import WorkerProcess, until
from tests.integration.worker.scheduler_client import SchedulerClient, cancel, dispatch, expected, finish

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


async def test_streams_are_what_the_hash_says(worker: WorkerProcess) -> None:
    async with SchedulerClient(worker.address) as scheduler:
        assert scheduler.report.worker_id == worker.id
        assert scheduler.report.numerics_fingerprint
        assert scheduler.models["echo"].state == fleet_pb2.MODEL_STATE_AVAILABLE
        await scheduler.load()
        free = scheduler.models["echo"].free_blocks
        assert free == scheduler.models["echo"].total_blocks > 0
        scheduler.send(dispatch("a", choices=2), dispatch("b", max_tokens=3, seed=9))
        assert await scheduler.done("a", choices=2) == [expected(16), expected(16, choice=1)]
        assert await scheduler.done("b") == [expected(3, seed=9)]
        assert set(scheduler.finished.values()) == {inference_pb2.FINISH_REASON_LENGTH}
        assert min(model.free_blocks for frame in scheduler.frames for model in frame.models) < free
        await scheduler.until(lambda: scheduler.models["echo"].free_blocks == free)


async def test_resume_goes_on_at_the_next_index(worker: WorkerProcess) -> None:
    async with SchedulerClient(worker.address) as scheduler:
        await scheduler.load()
        scheduler.send(dispatch("a", attempt=2, resume={0: expected(6)}))
        (tokens,) = await scheduler.done("a")
        assert tokens == [-1] * 6 + expected(16)[6:]


async def test_the_same_dispatch_twice_is_one_attempt(worker: WorkerProcess) -> None:
    async with SchedulerClient(worker.address) as scheduler:
        await scheduler.load()
        scheduler.send(dispatch("a"), dispatch("a"))
        scheduler.send(dispatch("a"))
        assert await scheduler.done("a") == [expected(16)]
        scheduler.send(dispatch("a"), dispatch("b", max_tokens=1))
        await scheduler.done("b")
        assert scheduler.tokens["a", 0] == expected(16)
        assert scheduler.failures == []


async def test_a_higher_epoch_replaces_and_a_lower_one_is_refused(worker: WorkerProcess) -> None:
    async with SchedulerClient(worker.address) as scheduler:
        await scheduler.load()
        scheduler.send(dispatch("a", attempt=1, max_tokens=4000))
        await scheduler.until(lambda: len(scheduler.tokens["a", 0]) > 2)
        have = len(scheduler.tokens["a", 0])
        scheduler.send(dispatch("a", attempt=3, max_tokens=have + 20, resume={0: scheduler.tokens["a", 0]}))
        scheduler.send(dispatch("a", attempt=2, max_tokens=4000))
        scheduler.tokens["a", 0] = scheduler.tokens["a", 0][:have]
        await scheduler.until(lambda: bool(scheduler.failures))
        assert [(failure.code, failure.epoch.attempt) for failure in scheduler.failures] == [("stale_term", 2)]


async def test_cancel_stops_and_leaves_a_tombstone(worker: WorkerProcess) -> None:
    async with SchedulerClient(worker.address) as scheduler:
        await scheduler.load()
        free = scheduler.models["echo"].free_blocks
        scheduler.send(dispatch("a", max_tokens=4000))
        await scheduler.until(lambda: len(scheduler.tokens["a", 0]) > 2)
        scheduler.send(cancel("a"), cancel("never-seen", attempt=2))
        await scheduler.until(lambda: scheduler.models["echo"].free_blocks == free)
        received = len(scheduler.tokens["a", 0])
        scheduler.send(dispatch("a"), dispatch("never-seen", attempt=2), dispatch("b", max_tokens=2))
        await scheduler.done("b")
        assert len(scheduler.tokens["a", 0]) == received
        assert ("never-seen", 0) not in scheduler.tokens
        scheduler.send(dispatch("never-seen", attempt=3, max_tokens=2))
        assert await scheduler.done("never-seen") == [expected(2)]


async def test_finish_ends_one_choice_early(worker: WorkerProcess) -> None:
    async with SchedulerClient(worker.address) as scheduler:
        await scheduler.load()
        scheduler.send(dispatch("a", choices=2, max_tokens=30), finish("a", 1, 4))
        await scheduler.done("a")
        assert scheduler.tokens["a", 0] == expected(30)
        assert scheduler.tokens["a", 1] == expected(4, choice=1)
        assert ("a", 1) not in scheduler.finished


async def test_a_dispatch_that_cannot_run_fails_alone(worker: WorkerProcess) -> None:
    async with SchedulerClient(worker.address) as scheduler:
        scheduler.send(dispatch("early"))
        await scheduler.until(lambda: len(scheduler.failures) == 1)
        await scheduler.load()
        scheduler.send(dispatch("long", max_tokens=100_000), dispatch("other", model="none"), dispatch("good"))
        assert await scheduler.done("good") == [expected(16)]
        await scheduler.until(lambda: len(scheduler.failures) == 3)
        codes = {failure.request_id: failure.code for failure in scheduler.failures}
        assert codes == {"early": "unavailable", "long": "context_length_exceeded", "other": "unavailable"}


async def test_terms_fence_schedulers(worker: WorkerProcess) -> None:
    async with SchedulerClient(worker.address, term=10) as old, SchedulerClient(worker.address, term=11) as new:
        assert new.report.highest_term == 11
        assert isinstance(await old.ended(), StaleTerm)
        with pytest.raises(StaleTerm):
            async with SchedulerClient(worker.address, term=10):
                pass
        await new.load()
        new.send(dispatch("a", term=11))
        assert await new.done("a") == [expected(16)]
        new.send(dispatch("b", term=11), term=10)
        assert isinstance(await new.ended(), StaleTerm)
        assert ("b", 0) not in new.tokens


async def test_a_newer_stream_of_the_same_term_takes_over_without_loss(worker: WorkerProcess) -> None:
    async with SchedulerClient(worker.address) as first:
        await first.load()
        first.send(dispatch("a", max_tokens=60))
        await first.until(lambda: len(first.tokens["a", 0]) > 2)
        async with SchedulerClient(worker.address) as second:
            ended = await first.ended()
            assert isinstance(ended, FleetError)
            assert not isinstance(ended, StaleTerm)
            assert [entry.request_id for entry in second.report.running] == ["a"]
            (tokens,) = await second.done("a")
            start = next(index for index, token in enumerate(tokens) if token >= 0)
            assert start <= len(first.tokens["a", 0])
            assert tokens[start:] == expected(60)[start:]


async def test_nothing_is_lost_while_frames_are_not_acknowledged(start_worker: StartWorker) -> None:
    async with start_worker() as worker, SchedulerClient(worker.address, acknowledge=False) as scheduler:
        await scheduler.load()
        for number in range(100):
            scheduler.send(dispatch(f"before-{number}", max_tokens=1))
            await scheduler.until(lambda: any(frame.outputs for frame in scheduler.frames))
        scheduler.send(dispatch("long", max_tokens=4000))
        # Heartbeats go on though the window is closed: they show the steps that were computed.
        await scheduler.until(lambda: scheduler.frames[-1].step >= 4000 and not scheduler.frames[-1].busy)
        with_content = [frame for frame in scheduler.frames if frame.outputs]
        assert len(with_content) <= 64
        scheduler.acknowledge = True
        scheduler.send(acknowledged=scheduler.frames[-1].sequence)
        assert await scheduler.done("long") == [expected(4000)]
        assert {key[0] for key in scheduler.finished} == {"long", *(f"before-{number}" for number in range(100))}


async def test_heartbeats_come_while_nothing_happens(worker: WorkerProcess) -> None:
    async with SchedulerClient(worker.address) as scheduler:
        await scheduler.until(lambda: len(scheduler.frames) >= 3)
        assert {frame.step for frame in scheduler.frames} == {0}
        assert not any(frame.busy for frame in scheduler.frames)


async def test_a_hanging_engine_shows_in_the_step_counter(worker: WorkerProcess) -> None:
    async with SchedulerClient(worker.address) as scheduler:
        await scheduler.load()
        scheduler.send(dispatch("a", max_tokens=100))
        await scheduler.until(lambda: len(scheduler.tokens["a", 0]) > 2)
        os.kill(worker.engine_pid, signal.SIGSTOP)
        try:
            await scheduler.until(lambda: _stands_still(scheduler.frames[-3:]))
        finally:
            os.kill(worker.engine_pid, signal.SIGCONT)
        assert await scheduler.done("a") == [expected(100)]


def _stands_still(frames: list[work_pb2.WorkFrame]) -> bool:
    return len(frames) == 3 and len({frame.step for frame in frames}) == 1 and all(frame.busy for frame in frames)


async def test_execute_and_stages_hang_below_the_schedulers_attempt(worker: WorkerProcess) -> None:
    async with SchedulerClient(worker.address) as scheduler:
        await scheduler.load()
        before = time.time_ns()
        scheduler.send(dispatch("a", traceparent=f"00-{TRACE_ID}-{SPAN_ID}-01"))
        await scheduler.done("a")
        await scheduler.until(lambda: len(scheduler.spans) == 3)
        spans = {span.name: span for span in scheduler.spans}
        execute = spans["execute"]
        assert execute.parent_span_id.hex() == SPAN_ID
        assert {span.trace_id.hex() for span in scheduler.spans} == {TRACE_ID}
        assert {spans[f"engine.{stage}"].parent_span_id for stage in ("prefill", "decode")} == {execute.span_id}
        assert {span.attributes["llmos.request_id"] for span in scheduler.spans} == {"a"}
        assert (execute.service, execute.node) == ("worker", worker.id)
        assert before <= execute.start_unix_ns <= spans["engine.prefill"].start_unix_ns
        assert spans["engine.decode"].end_unix_ns <= execute.end_unix_ns <= time.time_ns()


async def test_orphaned_attempts_are_cancelled(start_worker: StartWorker) -> None:
    async with start_worker("--orphan-s", "0.2", "--echo-tokens-per-second", "20") as worker:
        async with SchedulerClient(worker.address) as scheduler:
            await scheduler.load()
            free = scheduler.models["echo"].free_blocks
            scheduler.send(dispatch("a", max_tokens=4000))
            await scheduler.until(lambda: len(scheduler.tokens["a", 0]) > 1)
        await until(lambda: "cancelling 1 attempts" in worker.log())
        async with SchedulerClient(worker.address) as later:
            assert list(later.report.running) == []
            await later.until(lambda: later.models["echo"].free_blocks == free)


async def test_a_stream_must_begin_with_hello(worker: WorkerProcess) -> None:
    async with open_channel(worker.address) as channel:
        call = work_pb2_grpc.WorkStub(channel).Attach(iter([work_pb2.AttachRequest(term=10)]))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
        assert isinstance(error_from_rpc(refused.value), InvalidRequest)


async def test_an_unknown_blob_is_not_found(worker: WorkerProcess) -> None:
    async with open_channel(worker.address) as channel:
        request = work_pb2.WorkFetchBlobRequest(sha256=hashlib.sha256(b"").hexdigest())
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await work_pb2_grpc.WorkStub(channel).FetchBlob(request, timeout=10).read()
        assert isinstance(error_from_rpc(refused.value), NotFound)
