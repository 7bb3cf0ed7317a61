"""Life of a request in the core: accepted, dispatched, produced, ended; and every way to be refused."""

from __future__ import annotations

import pytest

from llmos.internal.v1 import request_pb2, work_pb2
from llmos.v1 import fleet_pb2
from scheduler import commands, events
from scheduler.policy import Policy
from tests.unit.scheduler.arena import MODEL, VERSION, Arena, make_request, token


@pytest.fixture
def arena() -> Arena:
    arena = Arena()
    arena.connect()
    arena.add_worker("w1")
    arena.post(events.MembersListed())
    return arena


def test_catalogue_reaches_gateways_once_a_model_is_loaded(arena: Arena) -> None:
    catalogue = arena.gateways["g1"].catalogue
    assert catalogue is not None
    assert [(model.name, model.version) for model in catalogue.models] == [(MODEL, VERSION)]


def test_request_runs_to_its_end(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=5))
    arena.run()
    assert client.tokens == [[token("r1", 0, i) for i in range(5)]]
    assert client.finished == [True]
    arena.check_idle()


def test_choices_run_side_by_side(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=4, choices=3))
    arena.run()
    assert [len(tokens) for tokens in client.tokens] == [4, 4, 4]
    assert len(arena.issued(commands.StartAttempt)) == 1


def test_dispatch_carries_version_epoch_and_remaining_time(arena: Arena) -> None:
    arena.submit(make_request("r1", deadline_ms=5000))
    (start,) = arena.issued(commands.StartAttempt)
    assert isinstance(start, commands.StartAttempt)
    dispatch = start.dispatch
    assert dispatch.epoch == request_pb2.Epoch(term=7, attempt=1)
    assert dispatch.request.model_version == VERSION
    assert dispatch.request.deadline_ms == 5000


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"model": "nobody-has-it"}, "model_not_found"),
        ({"model_version": "v0"}, "model_not_found"),
        ({"tokenizer_hash": "other"}, "invalid_request"),
        ({"max_tokens": 2000}, "context_length_exceeded"),
        ({"choices": 0}, "invalid_request"),
        ({"choices": 17}, "invalid_request"),
        ({"max_tokens": 0}, "invalid_request"),
        ({"resume": [request_pb2.ChoiceResume(choice=1)]}, "invalid_request"),
        ({"resume": [request_pb2.ChoiceResume(token_ids=[1] * 9)]}, "invalid_request"),
    ],
)
def test_refused_at_once(arena: Arena, change: dict[str, object], code: str) -> None:
    client = arena.submit(make_request("r1", **change))
    arena.deliver_output()
    assert client.error == code
    arena.check_idle()


def test_what_no_worker_could_hold_is_refused() -> None:
    arena = Arena()
    arena.connect()
    arena.add_worker("w1", blocks=4)
    arena.post(events.MembersListed())
    client = arena.submit(make_request("r1", prompt=100, max_tokens=900))
    arena.deliver_output()
    assert client.error == "context_length_exceeded"


def test_queue_is_bounded_and_says_when_to_come_back() -> None:
    arena = Arena(Policy(queue_limit=2))
    arena.connect()
    arena.add_worker("w1", blocks=1)
    clients = [arena.submit(make_request(f"r{i}")) for i in range(4)]
    arena.deliver_output()
    assert [client.error for client in clients] == ["", "", "", "overloaded"]
    (refusal,) = arena.issued(commands.SendFailure)
    assert isinstance(refusal, commands.SendFailure)
    assert 1000 <= refusal.failure.retry_after_ms <= 60_000
    arena.run()
    assert all(client.finished == [True] for client in clients[:3])


def test_waiting_requests_start_in_order_of_arrival() -> None:
    arena = Arena()
    arena.connect()
    arena.add_worker("w1", blocks=1)
    for i in range(4):
        arena.submit(make_request(f"r{i}", max_tokens=2))
    arena.run()
    starts = [c.dispatch.request.request_id for c in arena.commands if isinstance(c, commands.StartAttempt)]
    assert starts == ["r0", "r1", "r2", "r3"]


def test_an_urgent_deadline_goes_first() -> None:
    arena = Arena()
    arena.connect()
    arena.add_worker("w1", blocks=1)
    arena.submit(make_request("running", max_tokens=2))
    arena.submit(make_request("patient", max_tokens=2))
    arena.submit(make_request("urgent", max_tokens=2, deadline_ms=3000))
    arena.run()
    starts = [c.dispatch.request.request_id for c in arena.commands if isinstance(c, commands.StartAttempt)]
    assert starts == ["running", "urgent", "patient"]


def test_deadline_ends_a_running_request_and_its_attempt(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=500, deadline_ms=200))
    arena.deliver_orders("w1")
    arena.step("w1")
    arena.advance(0.25)
    arena.deliver_orders("w1")
    arena.deliver_output()
    assert client.error == "deadline_exceeded"
    assert not arena.workers["w1"].running
    arena.check_idle()


def test_cancel_frees_the_worker_and_is_final(arena: Arena) -> None:
    arena.submit(make_request("r1", max_tokens=500))
    arena.deliver_orders("w1")
    arena.cancel("r1")
    arena.deliver_orders("w1")
    assert not arena.workers["w1"].running
    arena.check_idle()


def test_cancel_that_overtakes_its_submission_wins(arena: Arena) -> None:
    arena.post(events.Cancelled(arena.gateways["g1"].stream_id, "r1", "client_gone"))
    client = arena.submit(make_request("r1"))
    arena.deliver_output()
    assert client.error == "cancelled"
    assert not arena.issued(commands.StartAttempt)


def test_a_tombstone_expires(arena: Arena) -> None:
    arena.post(events.Cancelled(arena.gateways["g1"].stream_id, "r1", "client_gone"))
    arena.advance(121)
    client = arena.submit(make_request("r1"))
    arena.run()
    assert client.finished == [True]


def test_kill_tells_the_client(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=500))
    arena.post(events.Killed("r1"))
    arena.deliver_output()
    assert client.error == "cancelled"
    arena.check_idle()


def test_the_same_id_twice_is_a_conflict(arena: Arena) -> None:
    arena.submit(make_request("r1"))
    issued = arena.post(events.Submitted(arena.gateways["g1"].stream_id, make_request("r1")))
    (refusal,) = issued
    assert isinstance(refusal, commands.SendFailure)
    assert refusal.failure.code == "conflict"
    assert "r1" in arena.core.state.requests


def test_finish_cuts_a_choice_short(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=500, choices=2))
    arena.deliver_orders("w1")
    for _ in range(5):
        arena.step("w1")
    arena.deliver_output()
    stream = arena.gateways["g1"].stream_id
    for choice in (0, 1):
        client.finished[choice] = True
        arena.post(events.ChoiceFinished(stream, "r1", choice, 3))
    arena.deliver_orders("w1")
    assert not arena.workers["w1"].running
    arena.check_idle()


def test_finish_ahead_of_the_tokens_waits_for_them(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=500))
    arena.deliver_orders("w1")
    arena.step("w1")
    arena.post(events.ChoiceFinished(arena.gateways["g1"].stream_id, "r1", 0, 3))
    for _ in range(4):
        arena.step("w1")
    arena.deliver_output()
    assert len(client.tokens[0]) == 3
    arena.check_idle()


def test_nobody_left_to_serve_is_an_error_after_the_grace(arena: Arena) -> None:
    client = arena.submit(make_request("r1", max_tokens=500))
    arena.kill("w1")
    for _ in range(59):
        arena.advance(1)
    arena.deliver_output()
    assert not client.error
    for _ in range(3):
        arena.advance(1)
    arena.deliver_output()
    assert client.error == "unavailable"
    assert arena.gateways["g1"].catalogue is not None
    assert not arena.gateways["g1"].catalogue.models


def test_a_request_for_a_model_that_still_loads_waits() -> None:
    arena = Arena()
    arena.connect()
    client = arena.submit(make_request("early"))
    worker = arena.add_worker("w1", loaded=False)
    assert not worker.loaded
    arena.run()
    assert client.finished == [True]


def test_gateways_know_whether_a_model_may_come() -> None:
    arena = Arena()
    arena.connect()

    def said() -> tuple[int, bool]:
        catalogue = arena.gateways["g1"].catalogue
        assert catalogue is not None
        return len(catalogue.models), catalogue.loading

    arena.post(events.MembersListed())
    arena.advance(10.0)
    assert said() == (0, True), "no worker has come yet"
    arena.add_worker("w1", loaded=False)
    assert said() == (0, True), "it has been told to load one"
    broken = fleet_pb2.NodeModel(name=MODEL, version=VERSION, state=fleet_pb2.MODEL_STATE_FAILED)
    arena.post(events.WorkerFrame("w1", work_pb2.WorkFrame(sequence=1, models=[broken])))
    assert said() == (0, False), "and cannot"
    arena.detach("w1")
    arena.advance(1.0)
    assert said() == (0, True), "it may have been mended when it comes back"
    arena.attach("w1")
    arena.run(3)
    arena.advance(1.0)
    assert said() == (1, False)


def test_what_an_earlier_leader_accepted_waits_for_a_worker_that_starts_anew() -> None:
    """The only worker has just been started and reports nothing loaded; gateways know the model from before."""
    arena = Arena()
    arena.connect()
    arena.add_worker("w1", loaded=False)
    arena.post(events.MembersListed())
    assert arena.core.state.settled
    assert arena.core.state.catalogue.get(MODEL) is None
    client = arena.submit(make_request("r1"))
    nobody = arena.submit(make_request("r2", model_version="v0"))
    arena.run()
    assert (client.finished, nobody.error) == ([True], "model_not_found")


def test_large_request_is_not_overtaken_for_ever() -> None:
    arena = Arena(Policy(bypass_limit=3))
    arena.connect()
    arena.add_worker("w1", blocks=4)
    small = [arena.submit(make_request(f"s{i}", max_tokens=4)) for i in range(2)]
    large = arena.submit(make_request("large", prompt=100, max_tokens=150))
    small += [arena.submit(make_request(f"t{i}", max_tokens=4 + i % 3)) for i in range(20)]
    arena.run()
    starts = [c.dispatch.request.request_id for c in arena.commands if isinstance(c, commands.StartAttempt)]
    assert starts.index("large") <= 2 + 3
    assert large.finished == [True]
    assert all(client.finished == [True] for client in small)
