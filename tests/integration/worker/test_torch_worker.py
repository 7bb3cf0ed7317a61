"""A worker process with the torch backend and a tiny random model out of a real store."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
import transformers

from llmos.internal.v1 import work_pb2, work_pb2_grpc
from llmos.rpc import open_channel
from llmos.store import Store, import_model
from llmos.v1 import fleet_pb2
from tests.fakes.models import model_files
from tests.integration.engine.tiny import write
from tests.integration.engine_fast import tiny as fast_tiny
from tests.integration.worker.processes import WorkerProcess, worker_process
from tests.integration.worker.scheduler_client import SchedulerClient, dispatch
from worker import kernels

pytestmark = pytest.mark.torch
TOKENS = 480
INT8_TOKENS = 1000


@pytest.fixture
async def torch_worker(tmp_path: Path) -> AsyncIterator[WorkerProcess]:
    write("llama", source := tmp_path / "source")
    async with _serving(tmp_path, source) as worker:
        yield worker


@contextlib.asynccontextmanager
async def _serving(tmp_path: Path, source: Path, *extra: str) -> AsyncIterator[WorkerProcess]:
    files = model_files()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).write_bytes(files[name])
    store = tmp_path / "store"
    import_model(Store(store), str(source), name="tiny", environ={})
    flags = ("--backend", "torch", "--model", "tiny", "--store", str(store), "--threads", "1", *extra)
    async with worker_process(tmp_path, *flags, "--etcd-endpoints", "") as worker:
        yield worker


async def test_a_torch_worker_resumes_exactly_after_its_engine_was_killed(torch_worker: WorkerProcess) -> None:
    async with SchedulerClient(torch_worker.address) as scheduler:
        assert "float32" in scheduler.report.numerics_fingerprint
        await _kill_and_resume(scheduler, torch_worker, TOKENS)


async def test_what_is_cached_is_told_up_the_stream(torch_worker: WorkerProcess) -> None:
    hashes = [11, 12]
    async with SchedulerClient(torch_worker.address) as scheduler:
        await scheduler.load("tiny")
        for name in ("first", "second"):
            order = dispatch(name, model="tiny", max_tokens=3)
            order.dispatch.request.token_ids[:] = [number % 100 for number in range(130)]
            order.dispatch.request.prefix_hashes[:] = hashes
            scheduler.send(order)
            await scheduler.done(name)
        outputs = [output for frame in scheduler.frames for output in frame.outputs]
        assert {output.request_id: output.cached_tokens for output in outputs if not output.index} == {
            "first": 0,
            "second": 128,
        }
        changes = [change for frame in scheduler.frames for change in frame.cache]
        assert [change.number for change in changes] == list(range(1, len(changes) + 1))
        assert [known for change in changes for known in change.stored] == hashes
        assert scheduler.models["tiny"].free_blocks == scheduler.models["tiny"].total_blocks


async def _kill_and_resume(scheduler: SchedulerClient, worker: WorkerProcess, tokens: int) -> None:
    await scheduler.load("tiny")
    scheduler.send(dispatch("whole", model="tiny", max_tokens=tokens))
    (whole,) = await scheduler.done("whole")
    scheduler.send(dispatch("broken", model="tiny", max_tokens=tokens))
    await scheduler.until(lambda: len(scheduler.tokens["broken", 0]) >= 3)
    os.kill(worker.engine_pid, signal.SIGKILL)
    await scheduler.until(lambda: scheduler.models["tiny"].state == fleet_pb2.MODEL_STATE_LOADING)
    await scheduler.until(lambda: scheduler.models["tiny"].state == fleet_pb2.MODEL_STATE_LOADED)
    received = list(scheduler.tokens["broken", 0])
    assert [failure.code for failure in scheduler.failures] == ["engine_lost"]
    assert len(received) < tokens
    scheduler.send(dispatch("broken", model="tiny", attempt=2, max_tokens=tokens, resume={0: received}))
    (again,) = await scheduler.done("broken")
    assert again == whole


@pytest.fixture
async def int8_worker(tmp_path: Path) -> AsyncIterator[WorkerProcess]:
    if not kernels.available():
        pytest.skip(kernels.reason())
    config = fast_tiny.config("llama")
    config.max_position_embeddings = 2 * INT8_TOKENS
    torch.manual_seed(1)
    source = tmp_path / "source"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(source)
    async with _serving(tmp_path, source, "--precision", "int8") as worker:
        yield worker


async def test_an_int8_worker_resumes_exactly_after_its_engine_was_killed(int8_worker: WorkerProcess) -> None:
    async with SchedulerClient(int8_worker.address) as scheduler:
        assert "int8 kernels" in scheduler.report.numerics_fingerprint
        await _kill_and_resume(scheduler, int8_worker, INT8_TOKENS)


async def test_gateways_get_tokenizer_and_template_by_hash(torch_worker: WorkerProcess) -> None:
    files = model_files()
    async with open_channel(torch_worker.address) as channel:
        for name in ("tokenizer.json", "chat_template.jinja"):
            digest = hashlib.sha256(files[name]).hexdigest()
            call = work_pb2_grpc.WorkStub(channel).FetchBlob(work_pb2.WorkFetchBlobRequest(sha256=digest), timeout=10)
            assert b"".join([chunk.data async for chunk in call]) == files[name]
