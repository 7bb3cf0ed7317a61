"""A worker process with the torch backend and a tiny random model out of a real store."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llmos.internal.v1 import work_pb2, work_pb2_grpc
from llmos.rpc import open_channel
from llmos.store import Store, import_model
from llmos.v1 import fleet_pb2
from tests.fakes.models import model_files
from tests.integration.engine.tiny import write
from tests.integration.worker.processes import WorkerProcess, worker_process
from tests.integration.worker.scheduler_client import SchedulerClient, dispatch

pytestmark = pytest.mark.torch
TOKENS = 480


@pytest.fixture
async def torch_worker(tmp_path: Path) -> AsyncIterator[WorkerProcess]:
    source = tmp_path / "source"
    write("llama", source)
    files = model_files()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).write_bytes(files[name])
    store = tmp_path / "store"
    import_model(Store(store), str(source), name="tiny", environ={})
    flags = ("--backend", "torch", "--model", "tiny", "--store", str(store), "--threads", "1")
    async with worker_process(tmp_path, *flags, "--etcd-endpoints", "") as worker:
        yield worker


async def test_a_torch_worker_resumes_exactly_after_its_engine_was_killed(torch_worker: WorkerProcess) -> None:
    async with SchedulerClient(torch_worker.address) as scheduler:
        assert "float32" in scheduler.report.numerics_fingerprint
        await scheduler.load("tiny")
        scheduler.send(dispatch("whole", model="tiny", max_tokens=TOKENS))
        (whole,) = await scheduler.done("whole")
        scheduler.send(dispatch("broken", model="tiny", max_tokens=TOKENS))
        await scheduler.until(lambda: len(scheduler.tokens["broken", 0]) >= 3)
        os.kill(torch_worker.engine_pid, signal.SIGKILL)
        await scheduler.until(lambda: scheduler.models["tiny"].state == fleet_pb2.MODEL_STATE_LOADING)
        await scheduler.until(lambda: scheduler.models["tiny"].state == fleet_pb2.MODEL_STATE_LOADED)
        received = list(scheduler.tokens["broken", 0])
        assert [failure.code for failure in scheduler.failures] == ["attempt_lost"]
        assert len(received) < TOKENS
        scheduler.send(dispatch("broken", model="tiny", attempt=2, max_tokens=TOKENS, resume={0: received}))
        (again,) = await scheduler.done("broken")
        assert again == whole


async def test_gateways_get_tokenizer_and_template_by_hash(torch_worker: WorkerProcess) -> None:
    files = model_files()
    async with open_channel(torch_worker.address) as channel:
        for name in ("tokenizer.json", "chat_template.jinja"):
            digest = hashlib.sha256(files[name]).hexdigest()
            call = work_pb2_grpc.WorkStub(channel).FetchBlob(work_pb2.WorkFetchBlobRequest(sha256=digest), timeout=10)
            assert b"".join([chunk.data async for chunk in call]) == files[name]
