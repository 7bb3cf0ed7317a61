"""What a worker decides about attempts and models, without processes."""

from __future__ import annotations

from llmos.internal.v1 import request_pb2, requests_pb2, work_pb2
from llmos.v1 import fleet_pb2
from tests.unit.worker.rig import LOADED, LOADING, PARENT, Rig, batch, cancel, dispatch, hello, load, piece
from worker.models import echo_model


def test_output_flows_and_the_attempt_ends() -> None:
    rig = Rig()
    rig.send(dispatch())
    rig.output(0)
    rig.output(1, end=True)
    frame = rig.core.next_frame()
    assert [(output.index, list(output.token_ids)) for output in frame.outputs] == [(0, [65, 65])]
    assert (frame.step, frame.busy) == (2, False)
    assert [span.name for span in frame.spans] == ["execute"]
    assert not rig.core.idle
    rig.send(acknowledged=frame.sequence)
    assert rig.core.idle


def test_nothing_to_say_wakes_nobody() -> None:
    rig = Rig()
    wakes = rig.stream.wakes
    rig.core.engine_frame(work_pb2.WorkFrame(step=5, busy=True))
    rig.send(acknowledged=1)
    assert rig.stream.wakes == wakes
    assert rig.core.next_frame().step == 5


def test_duplicates_reach_the_engine_once() -> None:
    rig = Rig()
    rig.send(dispatch(), dispatch())
    rig.send(dispatch())
    assert rig.engine.orders == ["load", "dispatch"]
    assert rig.core.counts["duplicate"] == 2


def test_a_replaced_attempt_says_nothing_more() -> None:
    rig = Rig()
    rig.send(dispatch())
    rig.output(0)
    rig.send(dispatch(attempt=2))
    rig.output(1)
    rig.output(0, attempt=2)
    frame = rig.core.next_frame()
    assert [output.epoch.attempt for output in frame.outputs] == [2]
    assert rig.core.counts["late"] == 1


def test_an_attempt_replaced_by_a_finished_one_is_stopped() -> None:
    rig = Rig()
    rig.send(dispatch())
    again = dispatch(attempt=2)
    again.dispatch.request.resume.add(choice=0, token_ids=[65], finished=True)
    rig.send(again)
    assert rig.engine.orders[-1] == "cancel"
    assert rig.running() == []


def test_cancel_drops_what_was_not_sent_and_closes_the_span() -> None:
    rig = Rig()
    rig.send(dispatch())
    rig.output(0)
    rig.send(cancel())
    rig.output(1)
    frame = rig.core.next_frame()
    assert list(frame.outputs) == []
    assert [(span.name, span.error) for span in frame.spans] == [("execute", "cancelled")]
    assert rig.engine.orders[-1] == "cancel"
    rig.send(cancel())
    assert rig.engine.orders.count("cancel") == 1


def test_a_change_of_class_reaches_the_engine_for_the_attempt_that_runs() -> None:
    rig = Rig()
    rig.send(dispatch(attempt=2))
    for attempt, name in ((1, "a"), (2, "a"), (2, "gone")):
        change = work_pb2.SetPriority(
            request_id=name,
            epoch=request_pb2.Epoch(term=1, attempt=attempt),
            priority=fleet_pb2.PRIORITY_CLASS_BATCH,
        )
        rig.send(work_pb2.Command(set_priority=change))
    assert rig.engine.orders.count("set_priority") == 1


def test_refusals_are_failures_of_that_attempt_alone() -> None:
    rig = Rig()
    rig.send(dispatch("x", model="other"), dispatch("y", model="vast"), dispatch("z"))
    frame = rig.core.next_frame()
    assert {(failure.request_id, failure.code) for failure in frame.failures} == {
        ("x", "unavailable"),
        ("y", "unavailable"),
    }
    assert rig.running() == [("z", 1)]


def test_an_engine_that_takes_nothing_fails_the_dispatch() -> None:
    rig = Rig()
    rig.engine.refuses = True
    rig.send(dispatch())
    assert [failure.code for failure in rig.core.next_frame().failures] == ["attempt_lost"]
    assert rig.running() == []


def test_a_gap_in_the_engines_output_fails_the_attempt() -> None:
    rig = Rig()
    rig.send(dispatch())
    rig.output(0)
    rig.output(2)
    frame = rig.core.next_frame()
    assert [output.index for output in frame.outputs] == [0]
    assert [failure.code for failure in frame.failures] == ["attempt_lost"]
    assert rig.engine.orders[-1] == "cancel"


def test_the_engines_own_failure_is_passed_on_once() -> None:
    rig = Rig()
    rig.send(dispatch())
    failure = request_pb2.Failure(request_id="a", epoch=request_pb2.Epoch(term=1, attempt=1), code="invalid_request")
    rig.core.engine_frame(work_pb2.WorkFrame(failures=[failure, failure]))
    assert [failure.code for failure in rig.core.next_frame().failures] == ["invalid_request"]


def test_a_lost_engine_loses_attempts_but_not_orders() -> None:
    rig = Rig()
    rig.send(dispatch("a"), dispatch("b"))
    rig.output(0)
    rig.core.engine_lost("signal 9")
    frame = rig.core.next_frame()
    assert [output.request_id for output in frame.outputs] == ["a"]
    assert {failure.request_id for failure in frame.failures} == {"a", "b"}
    assert {failure.code for failure in frame.failures} == {"engine_lost"}
    assert [(model.name, model.state, model.free_blocks) for model in frame.models] == [("echo", LOADING, 0)]
    rig.send(dispatch("c"))
    assert [failure.code for failure in rig.core.next_frame().failures] == ["attempt_lost"]
    rig.ready()
    assert rig.engine.orders[-1] == "load"
    rig.loaded()
    rig.send(dispatch("c", attempt=2))
    rig.core.engine_frame(work_pb2.WorkFrame(step=1))
    assert rig.core.next_frame().step == 2, "the counter goes on over the restart"


def test_orders_before_the_engine_is_there_are_carried_out_when_it_is() -> None:
    rig = Rig()
    rig.core.engine_lost("status 1")
    rig.send(work_pb2.Command(unload=work_pb2.UnloadModel(model="echo")), load())
    before = rig.engine.orders.count("load")
    rig.ready()
    assert rig.engine.orders.count("load") == before + 1


def test_a_model_that_ends_every_engine_is_given_up_and_the_others_go_on() -> None:
    rig = Rig()
    rig.shelf.add([echo_model("poison")])
    rig.send(load("poison"))
    for _ in range(2):
        rig.core.engine_lost("signal 9")
        rig.core.engine_lost("status 1")  # before it was ready: not the model's doing
        rig.ready()
        rig.loaded()
    rig.core.engine_lost("signal 9")
    states = {model.name: model for model in rig.core.next_frame().models}
    assert (states["echo"].state, states["poison"].state) == (LOADING, fleet_pb2.MODEL_STATE_FAILED)
    assert states["poison"].detail == "The engine ended 3 times while it loaded this."
    rig.engine.orders.clear()
    rig.ready()
    assert (rig.engine.orders, rig.engine.last.load.model) == (["load"], "echo")
    rig.loaded()
    rig.send(load("poison"))
    assert rig.engine.last.load.model == "poison", "it may be ordered again"


def test_loading_twice_is_one_load() -> None:
    rig = Rig()
    rig.send(load(), load("nobody"), load("vast"))
    assert rig.engine.orders == ["load"]


def test_a_failed_load_can_be_ordered_again() -> None:
    rig = Rig(attach=False)
    rig.ready()
    rig.core.attach(batch(hello(), load()), rig.stream)
    failed = fleet_pb2.NodeModel(name="echo", state=fleet_pb2.MODEL_STATE_FAILED, detail="no room")
    rig.core.engine_frame(work_pb2.WorkFrame(models=[failed]))
    (model,) = rig.core.next_frame().models
    assert (model.state, model.detail, model.version) == (fleet_pb2.MODEL_STATE_FAILED, "no room", "echo-1")
    rig.send(load())
    assert rig.engine.orders == ["load", "load"]


def test_another_version_is_refused() -> None:
    rig = Rig(attach=False)
    rig.ready()
    order = work_pb2.Command(load=work_pb2.LoadModel(model="echo", version="another"))
    rig.core.attach(batch(hello(), order), rig.stream)
    assert [model.state for model in rig.core.next_frame().models] == [fleet_pb2.MODEL_STATE_FAILED]
    assert rig.engine.orders == []


def test_an_order_without_a_budget_gets_the_largest_device() -> None:
    rig = Rig()
    assert rig.engine.last.load.memory_budget_bytes == 2**30


def test_unload_fails_its_attempts() -> None:
    rig = Rig()
    rig.send(dispatch(), work_pb2.Command(unload=work_pb2.UnloadModel(model="echo")))
    frame = rig.core.next_frame()
    assert [failure.code for failure in frame.failures] == ["attempt_lost"]
    assert [model.state for model in frame.models] == [fleet_pb2.MODEL_STATE_UNLOADING]
    rig.loaded()
    assert not rig.core.next_frame().models, "what the engine said before it unloaded is no news"
    gone = fleet_pb2.NodeModel(name="echo", state=fleet_pb2.MODEL_STATE_AVAILABLE)
    rig.core.engine_frame(work_pb2.WorkFrame(models=[gone]))
    (model,) = rig.core.next_frame().models
    assert (model.state, model.budget_bytes) == (fleet_pb2.MODEL_STATE_AVAILABLE, 0)


def test_memory_that_is_being_freed_is_free_once_the_engine_is_gone() -> None:
    rig = Rig()
    rig.send(work_pb2.Command(unload=work_pb2.UnloadModel(model="echo")))
    rig.core.engine_lost("signal 9")
    assert [model.state for model in rig.core.next_frame().models] == [fleet_pb2.MODEL_STATE_AVAILABLE]


def test_a_model_ordered_again_while_it_is_unloaded_is_loaded_again() -> None:
    rig = Rig()
    rig.send(work_pb2.Command(unload=work_pb2.UnloadModel(model="echo")), load())
    assert rig.engine.orders[-2:] == ["unload", "load"]
    gone = fleet_pb2.NodeModel(name="echo", state=fleet_pb2.MODEL_STATE_AVAILABLE)
    rig.core.engine_frame(work_pb2.WorkFrame(models=[gone]))
    assert [model.state for model in rig.core.next_frame().models] == [LOADING]
    rig.loaded()
    assert [model.state for model in rig.core.next_frame().models] == [LOADED]


def test_what_a_model_takes_is_told() -> None:
    rig = Rig()
    said = fleet_pb2.NodeModel(
        name="echo", state=LOADED, total_blocks=10, measured_bytes=700, measured_fixed_bytes=60, load_ms=5
    )
    rig.core.engine_frame(work_pb2.WorkFrame(models=[said]))
    (model,) = rig.core.next_frame().models
    assert (model.measured_bytes, model.measured_fixed_bytes, model.load_ms) == (700, 60, 5)
    assert model.budget_bytes == 2**30


def test_finish_of_the_last_choice_ends_the_attempt() -> None:
    rig = Rig()
    rig.send(dispatch())
    rig.output(0)
    finish = requests_pb2.Finish(request_id="a", choice=0, keep_until=1)
    rig.send(work_pb2.Command(finish=finish))
    assert rig.engine.orders[-1] == "finish"
    frame = rig.core.next_frame()
    assert [(span.name, span.error) for span in frame.spans] == [("execute", "")]
    rig.send(work_pb2.Command(finish=finish), acknowledged=frame.sequence)
    assert rig.core.idle


def test_stages_become_children_of_execute_on_the_wall_clock() -> None:
    rig = Rig()
    rig.send(dispatch())
    begin = rig.clock.monotonic()
    rig.clock.advance(2)
    attributes = {"llmos.request_id": "a", "llmos.term": "1", "llmos.attempt": "1", "llmos.tokens": "7"}
    stage = fleet_pb2.Span(
        name="engine.prefill",
        start_unix_ns=int((begin + 1) * 1e9),
        end_unix_ns=int((begin + 2) * 1e9),
        attributes=attributes,
    )
    rig.core.engine_frame(work_pb2.WorkFrame(spans=[stage], outputs=[piece(0, end=True)]))
    late = fleet_pb2.Span(name="engine.decode", attributes=attributes)
    rig.core.engine_frame(work_pb2.WorkFrame(spans=[late]))
    prefill, execute = rig.core.next_frame().spans
    assert (prefill.name, execute.name) == ("engine.prefill", "execute")
    assert prefill.parent_span_id == execute.span_id
    assert execute.parent_span_id.hex() == PARENT.split("-")[2]
    assert prefill.start_unix_ns - execute.start_unix_ns == 1_000_000_000
    assert prefill.end_unix_ns == execute.end_unix_ns
