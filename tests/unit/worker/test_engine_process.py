"""The engine's loop around a backend that a test scripts."""

from __future__ import annotations

import io
import socket
from collections.abc import Mapping

import msgspec
import pytest

from llmos.errors import InvalidRequest, Unavailable
from llmos.internal.v1 import request_pb2, requests_pb2, work_pb2
from llmos.v1 import fleet_pb2
from worker import pipe
from worker.backend import Attempt, Blocks, Epoch, Failure, Footprint, ModelSpec, Output, Stage, StageDone, StepResult
from worker.engine_process import Engine as EngineLoop
from worker.engine_process import EngineModel, EngineSetup, Transmit, serve

SPEC = ModelSpec("m", "v1")


class ScriptedBackend:
    """Does what the test says."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.result = StepResult()
        self.error: Exception | None = None
        self.working = False
        self.free = 10

    def load(self, spec: ModelSpec, memory_budget: int) -> Blocks:
        self._call("load", spec.name, memory_budget)
        return Blocks(10, 10)

    def unload(self, name: str) -> None:
        self._call("unload", name)

    def footprint(self, name: str) -> Footprint:
        return Footprint(1000, 64)

    def blocks(self) -> Mapping[str, Blocks]:
        return {"m": Blocks(10, self.free)}

    def admit(self, attempt: Attempt) -> None:
        self._call("admit", attempt.request_id)

    def cancel(self, request_id: str, choice: int | None = None, keep_until: int | None = None) -> None:
        self._call("cancel", request_id, choice, keep_until)

    def set_priority(self, request_id: str, priority: int) -> None:
        self._call("set_priority", request_id, priority)

    def busy(self) -> bool:
        return self.working

    def step(self) -> StepResult:
        return self.result

    def _call(self, *call: object) -> None:
        self.calls.append(call)
        if self.error is not None:
            raise self.error


class Sent(Transmit):
    """Frames instead of a socket."""

    def __init__(self) -> None:
        self.frames: list[work_pb2.WorkFrame] = []

    def __call__(self, message: work_pb2.AttachResponse) -> None:
        self.frames.append(message.frame)


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture
def sent() -> Sent:
    return Sent()


@pytest.fixture
def engine(backend: ScriptedBackend, sent: Sent) -> EngineLoop:
    return EngineLoop(backend, {"m": SPEC}, sent)


def load(version: str = "v1", model: str = "m") -> work_pb2.Command:
    return work_pb2.Command(load=work_pb2.LoadModel(model=model, version=version, memory_budget_bytes=99))


def test_commands_reach_the_backend_in_order(engine: EngineLoop, backend: ScriptedBackend) -> None:
    request = request_pb2.Request(request_id="a")
    engine.obey(
        [
            load(),
            work_pb2.Command(dispatch=work_pb2.Dispatch(request=request)),
            work_pb2.Command(finish=requests_pb2.Finish(request_id="a", choice=1, keep_until=5)),
            work_pb2.Command(
                set_priority=work_pb2.SetPriority(request_id="a", priority=fleet_pb2.PRIORITY_CLASS_BATCH)
            ),
            work_pb2.Command(cancel=work_pb2.CancelAttempt(request_id="a")),
            work_pb2.Command(unload=work_pb2.UnloadModel(model="m")),
        ]
    )
    assert backend.calls == [
        ("load", "m", 99),
        ("admit", "a"),
        ("cancel", "a", 1, 5),
        ("set_priority", "a", 2),
        ("cancel", "a", None, None),
        ("unload", "m"),
    ]


def test_a_step_becomes_one_frame(engine: EngineLoop, backend: ScriptedBackend, sent: Sent) -> None:
    epoch = Epoch(1, 2)
    backend.working = True
    backend.result = StepResult(
        [Output("a", epoch, 0, 0, [65])],
        [Failure("b", epoch, "attempt_lost", "Gone.")],
        [StageDone("a", epoch, Stage.PREFILL, 1.0, 2.0, 3)],
    )
    engine.step()
    engine.step()
    frame = sent.frames[-1]
    assert (frame.step, frame.busy) == (2, True)
    assert [output.request_id for output in frame.outputs] == ["a"]
    assert [failure.request_id for failure in frame.failures] == ["b"]
    assert [span.name for span in frame.spans] == ["engine.prefill"]


def test_the_counter_stands_still_without_work(engine: EngineLoop, sent: Sent) -> None:
    engine.step()
    assert (sent.frames[-1].step, sent.frames[-1].busy) == (0, False)


def test_blocks_are_told_when_they_change(engine: EngineLoop, backend: ScriptedBackend, sent: Sent) -> None:
    engine.step()
    assert list(sent.frames[-1].models) == []
    engine.obey([load()])
    for _ in range(2):
        engine.step()
    backend.free = 4
    engine.step()
    assert [[model.free_blocks for model in frame.models] for frame in sent.frames] == [[], [10], [], [4]]
    (first,) = sent.frames[1].models
    assert (first.measured_fixed_bytes, first.measured_bytes) == (1000, 1000 + 10 * 64)
    assert first.load_ms > 0
    # Loaded anew, it is told anew, even if the numbers are the same.
    engine.obey([load()])
    engine.step()
    assert [model.state for model in sent.frames[-1].models] == [fleet_pb2.MODEL_STATE_LOADED]


def test_an_unloaded_model_is_told_once_its_memory_is_free(
    engine: EngineLoop, backend: ScriptedBackend, sent: Sent
) -> None:
    engine.obey([load(), work_pb2.Command(unload=work_pb2.UnloadModel(model="m"))])
    engine.step()
    assert backend.calls[-1] == ("unload", "m")
    assert [(model.name, model.state) for model in sent.frames[-1].models] == [("m", fleet_pb2.MODEL_STATE_AVAILABLE)]


@pytest.mark.parametrize(
    ("error", "detail"), [(Unavailable("No room."), "No room."), (ValueError("secret path"), "ValueError")]
)
def test_a_load_that_fails_is_told_and_survived(
    engine: EngineLoop, backend: ScriptedBackend, sent: Sent, error: Exception, detail: str
) -> None:
    backend.error = error
    engine.obey([load()])
    engine.step()
    (model,) = sent.frames[-1].models
    assert (model.name, model.state) == ("m", fleet_pb2.MODEL_STATE_FAILED)
    assert detail in model.detail
    assert "secret" not in model.detail


@pytest.mark.parametrize("order", [load(version="v2"), load(model="other")])
def test_what_is_not_held_is_not_loaded(
    engine: EngineLoop, backend: ScriptedBackend, sent: Sent, order: work_pb2.Command
) -> None:
    engine.obey([order])
    engine.step()
    assert [model.state for model in sent.frames[-1].models] == [fleet_pb2.MODEL_STATE_FAILED]
    assert backend.calls == []


def test_a_refused_attempt_is_a_failure(engine: EngineLoop, backend: ScriptedBackend, sent: Sent) -> None:
    backend.error = InvalidRequest("Bad token.")
    epoch = request_pb2.Epoch(term=1, attempt=2)
    engine.obey(
        [work_pb2.Command(dispatch=work_pb2.Dispatch(epoch=epoch, request=request_pb2.Request(request_id="a")))]
    )
    engine.step()
    engine.step()
    (failure,) = sent.frames[0].failures
    assert (failure.request_id, failure.epoch, failure.code) == ("a", epoch, "invalid_request")
    assert list(sent.frames[1].failures) == []


def test_a_bug_in_a_step_is_not_hidden(engine: EngineLoop, backend: ScriptedBackend) -> None:
    backend.working = True
    backend.result = None  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        engine.step()


def test_messages_survive_the_pipe_and_its_end_is_seen() -> None:
    stream = io.BytesIO(pipe.frame(b"one") + pipe.frame(b"") + b"\x05\x00\x00\x00tw")
    assert [pipe.read(stream) for _ in range(4)] == [b"one", b"", None, None]


def test_an_absurd_length_is_the_end_of_the_pipe() -> None:
    assert pipe.read(io.BytesIO(b"\xff\xff\xff\xff")) is None


def setup(**fields: object) -> bytes:
    model = EngineModel(name="echo", version="1", folder="/somewhere", weight_bytes=1, context_length=9)
    values: dict[str, object] = {"backend": "echo", "threads": 1, "tokens_per_second": 0.0, "models": (model,)}
    return msgspec.json.encode(EngineSetup(**{**values, **fields}))  # type: ignore[arg-type]


def test_the_setup_survives_the_pipe() -> None:
    decoded = msgspec.json.decode(setup(), type=EngineSetup)
    spec = decoded.models[0].spec()
    assert (spec.name, str(spec.folder), spec.weight_bytes, spec.context_length) == ("echo", "/somewhere", 1, 9)
    assert EngineModel(name="a", version="1").spec().folder is None


def test_a_backend_that_cannot_exist_is_an_exit_status() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pipe.write(ours, setup(backend="abacus"))
        assert serve(theirs) == 3
