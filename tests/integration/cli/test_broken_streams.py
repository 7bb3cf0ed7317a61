"""Answers that break off: `generate` and `chat` go on with them by their id, here or elsewhere."""

from __future__ import annotations

import pytest

from llmos.cli import answering
from llmos.v1 import inference_pb2 as pb
from tests.fakes.scripted_gateway import ScriptedGateway, scripted_gateway
from tests.integration.cli.conftest import Terminal


def test_a_broken_stream_goes_on_with_what_has_come(gateway: ScriptedGateway, terminal: Terminal) -> None:
    gateway.breaks = 1
    assert terminal.run("generate", "x", "-t", "1") == (0, "Paris\n", "")
    first, second = gateway.asked
    assert not first.HasField("resume")
    assert second == pb.ResumeStreamRequest(request_id="r1", held=[pb.StreamPosition(tokens=1, text_chars=3)])


def test_a_stream_that_the_fleet_forgot_goes_on_by_what_has_come(gateway: ScriptedGateway, terminal: Terminal) -> None:
    gateway.breaks, gateway.forgets = 1, True
    assert terminal.run("generate", "x", "-t", "1") == (0, "Paris\n", "")
    _, by_id, second = gateway.asked
    assert by_id.request_id == "r1"
    (held,) = second.resume.choices
    assert (second.resume.request_id, second.params.seed) == ("r1", 5)
    assert (list(held.token_ids), held.text_chars, held.finished) == ([0], 3, False)


def test_a_turn_of_a_chat_goes_on_at_another_address(
    gateway: ScriptedGateway, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted_gateway() as other:
        monkeypatch.setenv("LLMOS_ADDRESS", f"127.0.0.1:1, {gateway.address},{other.address}")
        gateway.breaks = 1
        terminal.type("one\n")
        assert terminal.run("chat")[:2] == (0, "Paris\n")
    assert [type(one).__name__ for one in gateway.asked] == ["StreamChatRequest"]
    assert [one.held[0].tokens for one in other.asked] == [1]


def test_an_answer_that_breaks_off_for_good_ends_its_line(
    gateway: ScriptedGateway, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "_PATIENCE_S", 0.2)
    gateway.breaks = 99
    status, out, err = terminal.run("generate", "x")
    assert (status, out, err.count("\n")) == (1, "Paris\n", 1)
    assert len(gateway.asked) < 99
