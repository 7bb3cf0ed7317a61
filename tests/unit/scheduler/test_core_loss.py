"""Workers, gateways and leaders that come and go under running requests."""

from __future__ import annotations

import pytest

from llmos.internal.v1 import request_pb2
from scheduler import commands, events
from tests.unit.scheduler.arena import Arena, make_record, make_request, token


@pytest.fixture
def arena() -> Arena:
    arena = Arena()
    arena.connect()
    arena.add_worker("w1")
    arena.post(events.MembersListed())
    return arena


def produce(arena: Arena, worker_id: str, steps: int) -> None:
    arena.deliver_orders(worker_id)
    for _ in range(steps):
        arena.step(worker_id)
    arena.deliver_output()


def last_dispatch(arena: Arena) -> commands.StartAttempt:
    start = arena.issued(commands.StartAttempt)[-1]
    assert isinstance(start, commands.StartAttempt)
    return start


def test_worker_lost_is_resumed_elsewhere_at_the_next_index(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=10))
    produce(arena, "w1", 4)
    arena.add_worker("w2")
    arena.kill("w1")
    start = last_dispatch(arena)
    assert start.worker_id == "w2"
    assert start.dispatch.epoch.attempt == 2
    assert list(start.dispatch.request.resume[0].token_ids) == [token("r1", 0, i) for i in range(4)]
    arena.run()
    assert client.tokens == [[token("r1", 0, i) for i in range(10)]]


def test_migrations_are_not_retries(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=200))
    for i in range(2, 12):
        produce(arena, f"w{i - 1}", 3)
        arena.add_worker(f"w{i}")
        arena.kill(f"w{i - 1}")
    arena.run(steps=400)
    assert client.finished == [True]


def test_late_output_of_a_lost_attempt_is_refused(arena: Arena) -> None:
    arena.submit(make_request("r1", max_tokens=50))
    produce(arena, "w1", 2)
    arena.add_worker("w2")
    stale = arena.workers["w1"].step()
    arena.detach("w1")
    arena.attach("w1")
    before = arena.core.state.counters["stale_outputs"]
    issued = arena.post(events.WorkerFrame("w1", stale))
    assert not [c for c in issued if isinstance(c, commands.SendOutput)]
    assert arena.core.state.counters["stale_outputs"] == before + 1


def test_a_worker_that_comes_back_is_told_to_stop_what_moved_on(arena: Arena) -> None:
    arena.submit(make_request("r1", max_tokens=50))
    produce(arena, "w1", 2)
    arena.add_worker("w2")
    arena.detach("w1")
    assert "r1" in arena.workers["w1"].running
    arena.attach("w1")
    arena.deliver_orders("w1")
    assert "r1" not in arena.workers["w1"].running
    arena.run()
    arena.check_idle()


def test_a_worker_that_comes_back_alone_goes_on_itself(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=12))
    produce(arena, "w1", 4)
    arena.detach("w1")
    arena.step("w1")
    arena.attach("w1")
    arena.run()
    assert client.tokens == [[token("r1", 0, i) for i in range(12)]]


def test_gap_breaks_the_attempt_not_the_request(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=10))
    produce(arena, "w1", 3)
    arena.add_worker("w2")
    arena.workers["w1"].skip_next = True
    produce(arena, "w1", 1)
    assert arena.core.state.counters["broken_attempts"] == 1
    arena.advance(0.1)
    assert last_dispatch(arena).worker_id == "w2"
    arena.run()
    assert client.tokens == [[token("r1", 0, i) for i in range(10)]]


def test_repeated_frame_is_dropped(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=10))
    arena.deliver_orders("w1")
    frame = arena.workers["w1"].step()
    for _ in range(3):
        arena.post(events.WorkerFrame("w1", frame))
    assert arena.core.state.counters["repeated_outputs"] == 2
    arena.run()
    assert client.finished == [True]


def test_retryable_failures_are_retried_three_times(arena: Arena) -> None:
    arena.workers["w1"].fail_next = ["overloaded"] * 3
    client = arena.submit(make_request("r1"))
    arena.run()
    assert client.finished == [True]
    assert len(arena.issued(commands.StartAttempt)) == 4


def test_a_fourth_failure_reaches_the_client(arena: Arena) -> None:
    arena.workers["w1"].fail_next = ["overloaded"] * 4
    client = arena.submit(make_request("r1"))
    arena.run()
    assert client.error == "overloaded"
    arena.check_idle()


def test_a_mistake_of_the_client_is_not_retried(arena: Arena) -> None:
    arena.workers["w1"].fail_next = ["unsupported_feature"]
    client = arena.submit(make_request("r1"))
    arena.run()
    assert client.error == "unsupported_feature"
    assert len(arena.issued(commands.StartAttempt)) == 1


def test_a_crashed_engine_is_a_migration(arena: Arena) -> None:
    arena.workers["w1"].fail_next = ["attempt_lost"] * 5
    client = arena.submit(make_request("r1"))
    arena.run()
    assert client.finished == [True]
    assert arena.core.state.counters["retries"] == 0


def test_retry_goes_to_an_untried_worker(arena: Arena) -> None:
    arena.workers["w1"].fail_next = ["overloaded"]
    arena.submit(make_request("r1"))
    arena.deliver_orders("w1")
    arena.add_worker("w2")
    arena.step("w1")
    arena.advance(0.1)
    assert last_dispatch(arena).worker_id == "w2"


def test_draining_worker_finishes_what_it_has_and_gets_nothing_new(arena: Arena) -> None:
    first = arena.submit(make_request("r1", max_tokens=20))
    arena.deliver_orders("w1")
    arena.workers["w1"].draining = True
    arena.step("w1")
    second = arena.submit(make_request("r2", max_tokens=5))
    for _ in range(30):
        arena.step("w1")
    arena.deliver_output()
    assert first.finished == [True]
    assert second.tokens == [[]]
    arena.add_worker("w2")
    arena.run()
    assert second.finished == [True]


def test_deregistered_worker_serves_while_its_stream_lives(arena: Arena) -> None:
    arena.post(events.WorkerDeregistered("w1"))
    client = arena.submit(make_request("r1"))
    arena.run()
    assert client.finished == [True]
    issued = arena.post(events.WorkerDetached("w1", "eof"))
    assert commands.HangUp("w1") in issued
    assert not arena.core.state.workers


def test_worker_registers_again_while_its_stream_lives(arena: Arena) -> None:
    arena.post(events.WorkerDeregistered("w1"))
    arena.post(events.WorkerRegistered(make_record("w1")))
    issued = arena.post(events.WorkerDetached("w1", "eof"))
    assert commands.HangUp("w1") not in issued
    assert "w1" in arena.core.state.workers


def test_a_moved_worker_is_dialled_anew(arena: Arena) -> None:
    record = make_record("w1")
    record.address = "elsewhere:2"
    issued = arena.post(events.WorkerRegistered(record))
    assert issued == [commands.HangUp("w1"), commands.Dial("w1", "elsewhere:2")]


def test_gateway_gone_for_good_cancels_its_requests(arena: Arena) -> None:
    arena.submit(make_request("r1", max_tokens=500))
    arena.deliver_orders("w1")
    arena.disconnect()
    arena.advance(1.4)
    assert arena.core.state.requests
    arena.advance(0.2)
    arena.deliver_orders("w1")
    assert not arena.workers["w1"].running
    arena.check_idle()


def test_gateway_that_returns_gets_what_it_missed(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=20))
    produce(arena, "w1", 3)
    arena.step("w1")
    arena.disconnect()
    arena.step("w1")
    arena.advance(1.0)
    arena.connect()
    assert len(arena.issued(commands.StartAttempt)) == 1
    arena.advance(1.0)
    arena.run()
    assert client.tokens == [[token("r1", 0, i) for i in range(20)]]


def test_second_stream_of_a_gateway_replaces_the_first(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=20))
    produce(arena, "w1", 3)
    old = arena.gateways["g1"].stream_id
    arena.connect()
    assert commands.CloseStream(old) in arena.commands
    arena.post(events.GatewayLost(old))
    arena.advance(2.0)
    arena.run()
    assert client.finished == [True]


def test_request_that_ended_unheard_is_computed_again(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=6))
    produce(arena, "w1", 3)
    for _ in range(3):
        arena.step("w1")
    assert not arena.core.state.requests
    arena.disconnect()
    arena.connect()
    arena.run()
    assert client.tokens == [[token("r1", 0, i) for i in range(6)]]


def test_all_tokens_but_no_finish_is_finished_here(arena: Arena) -> None:
    tokens = [token("r1", 0, i) for i in range(6)]
    request = make_request("r1", max_tokens=6, resume=[request_pb2.ChoiceResume(token_ids=tokens)])
    client = arena.submit(request)
    client.tokens = [tokens]
    arena.deliver_output()
    assert client.finished == [True]
    assert not arena.issued(commands.StartAttempt)


def test_logprobs_missed_are_sent_again(arena: Arena) -> None:
    arena.submit(make_request("r1", max_tokens=20))
    arena.deliver_orders("w1")
    frame = arena.workers["w1"].step()
    frame.outputs[0].logprobs.add(token_id=frame.outputs[0].token_ids[0], logprob=-0.5)
    arena.disconnect()
    arena.post(events.WorkerFrame("w1", frame))
    arena.connect()
    (sent,) = arena.issued(commands.SendOutput)
    assert isinstance(sent, commands.SendOutput)
    assert [entry.logprob for entry in sent.output.logprobs] == [-0.5]


def test_diverged_gateway_is_believed(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=10))
    produce(arena, "w1", 2)
    client.tokens[0] += [token("r1", 0, 2), token("r1", 0, 3)]
    arena.disconnect()
    arena.connect()
    assert arena.core.state.counters["diverged"] == 1
    arena.run()
    assert client.tokens == [[token("r1", 0, i) for i in range(10)]]
