"""The commands against a real gRPC server with canned answers."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from llmos.certs import make_certificates
from llmos.cli.completion import worker_ids
from llmos.v1 import fleet_pb2
from llmos.v1 import inference_pb2 as pb
from tests.fakes.scripted_gateway import ScriptedGateway, scripted_gateway
from tests.integration.cli.conftest import Terminal


def test_what_the_system_refuses_is_one_line(terminal: Terminal) -> None:
    status, out, err = terminal.run("keys", "add", "--tenant", "acme", "--file", "/dev/null/folder/keys.json")
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert "Not a directory" in err
    assert "/dev/null/folder" in err


def test_nodes_for_programs(gateway: ScriptedGateway, terminal: Terminal) -> None:
    status, out, _ = terminal.run("nodes", "--json")
    assert status == 0
    scheduler, worker = json.loads(out)
    keys = [
        "id",
        "role",
        "pid",
        "host",
        "address",
        "backend",
        "models",
        "state",
        "capacity",
        "restarts",
        "detail",
        "uses",
    ]
    assert list(scheduler) == list(worker) == keys
    assert (scheduler["role"], scheduler["state"], scheduler["capacity"]) == ("scheduler", "ready", None)
    assert (worker["role"], worker["state"], worker["backend"], worker["pid"]) == ("worker", "ready", "echo", 11)
    assert worker["models"][0]["name"] == "m"
    assert worker["models"][0]["state"] == "loaded"
    assert worker["capacity"]["devices"] == [{"id": "cpu", "kind": "cpu", "name": "CPU", "memory_bytes": 2**30}]


def test_nodes_for_people(gateway: ScriptedGateway, terminal: Terminal) -> None:
    status, out, _ = terminal.run("nodes")
    assert status == 0
    for text in ("w1", "worker", "m (loaded)", "2 cores", "1.0 GiB"):
        assert text in out


def test_ps_for_programs(gateway: ScriptedGateway, terminal: Terminal) -> None:
    status, out, _ = terminal.run("ps", "--json")
    assert status == 0
    assert json.loads(out) == [
        {
            "id": "r1",
            "state": "decode",
            "model": "m",
            "tenant": "t",
            "class": "standard",
            "worker": "w1",
            "attempt": 1,
            "tokens_in": 3,
            "tokens_out": 4,
            "age_ms": 1500,
        }
    ]


def test_ps_for_people(gateway: ScriptedGateway, terminal: Terminal) -> None:
    _, out, _ = terminal.run("ps")
    assert "r1" in out
    assert "1.50 s" in out


def test_kill(gateway: ScriptedGateway, terminal: Terminal) -> None:
    assert terminal.run("kill", "r1") == (0, "killed r1\n", "")
    status, _, err = terminal.run("kill", "r9")
    assert status == 1
    assert err.count("\n") == 1
    assert "no request r9" in err


def test_nice(gateway: ScriptedGateway, terminal: Terminal) -> None:
    assert terminal.run("nice", "r1", "batch") == (0, "r1: standard -> batch\n", "")
    assert gateway.asked[-1].priority == fleet_pb2.PRIORITY_CLASS_BATCH
    assert terminal.run("nice", "r1", "standard")[1] == "r1 is standard already\n"
    status, out, _ = terminal.run("nice", "r1", "interactive", "--json")
    assert json.loads(out) == {"id": "r1", "before": "standard", "class": "interactive"}
    status, _, err = terminal.run("nice", "r9", "batch")
    assert (status, err) == (1, "llmos: No request of that id waits or runs.\n")
    assert terminal.run("nice", "r1", "urgent")[0] == 2


def test_drain(gateway: ScriptedGateway, terminal: Terminal) -> None:
    gateway.running = 2
    assert terminal.run("drain", "w1")[:2] == (0, "w1 takes nothing new; 2 requests on it will move on or finish\n")
    assert not gateway.asked[-1].undo
    status, out, err = terminal.run("drain", "w1", "--wait")
    assert (status, out) == (0, "w1 is drained: nothing runs on it\n")
    assert "2 requests left" in err
    assert "1 request left" in err
    assert json.loads(terminal.run("drain", "w1", "--json")[1]) == {"id": "w1", "state": "drained", "running": 0}
    assert terminal.run("drain", "w1", "--undo")[1] == "w1 is back in service\n"
    assert gateway.asked[-1].undo
    status, _, err = terminal.run("drain", "w9")
    assert (status, err) == (1, "llmos: There is no worker of that id.\n")


def test_a_drain_that_takes_too_long_says_so(gateway: ScriptedGateway, terminal: Terminal) -> None:
    gateway.running = 1000
    status, _, err = terminal.run("drain", "w1", "--wait", "--timeout", "0.5")
    assert status == 1
    assert "goes on draining" in err


def test_top_once(gateway: ScriptedGateway, terminal: Terminal) -> None:
    status, out, _ = terminal.run("top", "--once")
    assert status == 0
    for text in ("1/1 workers · 1 running · 2 waiting · 40 tokens/s", "11%", "5.5/20/30", "interactive", "3,000", "r1"):
        assert text in out


def test_top_for_programs(gateway: ScriptedGateway, terminal: Terminal) -> None:
    found = json.loads(terminal.run("top", "--json")[1])
    assert list(found) == ["term", "nodes", "workers", "models", "queues", "requests", "counters"]
    assert found["models"][0]["ttft_ms"] == {"p50": 5.5, "p95": 20.0, "p99": 30.0}
    assert found["queues"][0] == {
        "class": "interactive",
        "tenant": "t",
        "weight": 4,
        "waiting": 2,
        "waiting_tokens": 3000,
        "running": 1,
        "tokens_per_s": 41.5,
    }
    assert found["workers"] == [{"id": "w1", "running": 1, "tokens_per_s": 40.0, "steps_per_s": 20.0}]
    assert found["counters"] == {"migrations": 3}


def test_top_says_what_it_needs(gateway: ScriptedGateway, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "llmos.cli.top_app", raising=False)
    monkeypatch.setitem(sys.modules, "textual", None)
    monkeypatch.setitem(sys.modules, "textual.app", None)
    status, _, err = terminal.run("top")
    assert status == 1
    assert "pip install 'llmos[top]'" in err


def test_completion_of_workers(gateway: ScriptedGateway) -> None:
    assert worker_ids("") == ["w1"]
    assert worker_ids("x") == []


def test_trace_draws_the_tree(gateway: ScriptedGateway, terminal: Terminal) -> None:
    status, out, _ = terminal.run("trace", "r1")
    assert status == 0
    assert "chat m" in out
    assert "└─ queue" in out
    assert "100.0% covered" in out


def test_trace_for_programs(gateway: ScriptedGateway, terminal: Terminal) -> None:
    _, out, _ = terminal.run("trace", "r1", "--json")
    root, child = json.loads(out)
    assert child["parent_span_id"] == root["span_id"]
    assert child["attributes"] == {"llmos.request_id": "r1"}


def test_trace_as_a_picture(gateway: ScriptedGateway, terminal: Terminal, tmp_path: Path) -> None:
    status, out, _ = terminal.run("trace", "r1", "--svg", str(tmp_path / "r1.svg"))
    assert status == 0 and "2 spans" in out
    assert ">queue</text>" in (tmp_path / "r1.svg").read_text()
    status, _, err = terminal.run("trace", "r1", "--svg", str(tmp_path / "none" / "r1.svg"))
    assert status == 1 and "cannot be written" in err


def test_a_trace_that_is_gone(gateway: ScriptedGateway, terminal: Terminal) -> None:
    status, _, err = terminal.run("trace", "r9")
    assert status == 1
    assert "r9" in err


def test_generate_streams_text(gateway: ScriptedGateway, terminal: Terminal) -> None:
    status, out, _ = terminal.run("generate", "Capital of France?", "--max-tokens", "9", "-t", "0", "--seed", "5")
    assert (status, out) == (0, "Paris\n")
    (request,) = gateway.asked
    assert isinstance(request, pb.StreamChatRequest)
    assert [(message.role, message.content) for message in request.messages] == [(pb.ROLE_USER, "Capital of France?")]
    assert (request.params.max_tokens, request.params.temperature, request.params.seed) == (9, 0.0, 5)


def test_what_is_not_given_is_left_to_the_gateway(gateway: ScriptedGateway, terminal: Terminal) -> None:
    terminal.run("generate", "x")
    params = gateway.asked[0].params
    assert not params.HasField("max_tokens")
    assert not params.HasField("temperature")
    assert not params.HasField("seed")


def test_what_the_answer_must_look_like(gateway: ScriptedGateway, terminal: Terminal, tmp_path: Path) -> None:
    (schema := tmp_path / "person.json").write_text('{"type": "object"}')
    for command in (("generate", "x"), ("chat",)):
        for flags in (("--json-schema", str(schema)), ("--regex", "a+"), ("--choice", "a", "--choice", "b")):
            terminal.type("x\n")
            terminal.run(*command, *flags)
    found = [request.params.constraint for request in gateway.asked]
    expected = [
        pb.Constraint(json_schema='{"type": "object"}'),
        pb.Constraint(regex="a+"),
        pb.Constraint(choice=pb.ConstraintChoices(texts=["a", "b"])),
    ]
    assert found == expected * 2
    status, _, err = terminal.run("generate", "x", "--regex", "a", "--choice", "b")
    assert (status, "one of --json-schema" in err) == (1, True)


def test_generate_for_programs(gateway: ScriptedGateway, terminal: Terminal) -> None:
    _, out, _ = terminal.run("generate", "x", "--json")
    assert json.loads(out) == {
        "id": "r1",
        "model": "m",
        "model_version": "v",
        "seed": 5,
        "text": "Paris",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 0},
    }


@pytest.mark.parametrize("flags", [("--raw",), ()])
def test_generate_continues_a_text(gateway: ScriptedGateway, terminal: Terminal, flags: tuple[str, ...]) -> None:
    if not flags:
        gateway.models = [pb.ServedModel(name="base", capabilities=["completion"])]
    _, out, _ = terminal.run("generate", "Once", "--no-stream", *flags)
    assert out == "Paris\n"
    assert isinstance(gateway.asked[0], pb.StreamCompleteRequest)
    assert gateway.asked[0].text == "Once"


def test_generate_reads_standard_input(gateway: ScriptedGateway, terminal: Terminal) -> None:
    terminal.type("from a pipe")
    terminal.run("generate", "-")
    assert gateway.asked[0].messages[0].content == "from a pipe"


@pytest.mark.parametrize("arguments", [("generate", "\udcff"), ("kill", "\udcff")])
def test_input_that_is_no_text_is_one_line(
    gateway: ScriptedGateway, terminal: Terminal, arguments: tuple[str, ...]
) -> None:
    status, out, err = terminal.run(*arguments)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "not UTF-8" in err


def test_a_typed_error_is_one_line(gateway: ScriptedGateway, terminal: Terminal) -> None:
    assert terminal.run("generate", "x", "--max-tokens", "13") == (1, "", "llmos: the queue is full\n")


def test_a_model_must_be_chosen_among_several(gateway: ScriptedGateway, terminal: Terminal) -> None:
    gateway.models = [pb.ServedModel(name="a"), pb.ServedModel(name="b")]
    assert "choose one with --model (a, b)" in terminal.run("generate", "x")[2]
    assert "does not serve 'c': choose one of a, b" in terminal.run("generate", "x", "-m", "c")[2]
    gateway.models = []
    assert "serves no model" in terminal.run("generate", "x")[2]


def test_chat_keeps_the_conversation(gateway: ScriptedGateway, terminal: Terminal) -> None:
    terminal.type("one\n\ntwo\n/clear\nthree\n/exit\nnever\n")
    assert terminal.run("chat", "--system", "Be brief.")[:2] == (0, "Paris\nParis\nParis\n")
    said = [[message.content for message in request.messages] for request in gateway.asked]
    assert said == [["Be brief.", "one"], ["Be brief.", "one", "Paris", "two"], ["Be brief.", "three"]]


def test_a_failed_turn_in_a_pipe_ends_the_chat(gateway: ScriptedGateway, terminal: Terminal) -> None:
    terminal.type("one\ntwo\n")
    assert terminal.run("chat", "--max-tokens", "13") == (1, "", "llmos: the queue is full\n")


def test_a_model_that_cannot_chat(gateway: ScriptedGateway, terminal: Terminal) -> None:
    gateway.models = [pb.ServedModel(name="base", capabilities=["completion"])]
    assert "base cannot chat" in terminal.run("chat")[2]


def test_the_key_goes_with_every_call(
    gateway: ScriptedGateway, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMOS_API_KEY", "secret")
    terminal.run("nodes")
    terminal.run("generate", "x")
    assert gateway.keys == ["Bearer secret", "Bearer secret"]


def test_nobody_at_the_address(gateway: ScriptedGateway, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOS_ADDRESS", "127.0.0.1:1")
    status, _, err = terminal.run("ps")
    assert status == 1
    assert "no gateway answers at 127.0.0.1:1" in err


def test_tls_with_the_right_authority_only(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    ours, other = (make_certificates(tmp_path / name, [], 1, now) for name in ("ours", "other"))
    with scripted_gateway((ours.key("server").read_bytes(), ours.certificate("server").read_bytes())) as gateway:
        monkeypatch.setenv("LLMOS_ADDRESS", gateway.address)
        for authority, expected in ((str(ours.ca), 0), (str(other.ca), 1), ("", 1), (str(tmp_path / "missing"), 1)):
            monkeypatch.setenv("LLMOS_CA_FILE", authority)
            assert terminal.run("nodes")[0] == expected
        assert len(gateway.asked) == 1


def test_completion_offers_what_there_is(gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmos.cli.completion import request_ids, served_models

    assert request_ids("r") == ["r1"]
    assert request_ids("x") == []
    assert served_models("") == ["m"]
    monkeypatch.setenv("LLMOS_ADDRESS", "127.0.0.1:1")
    assert served_models("") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate",),
        ("generate", "x", "--temperature", "3"),
        ("generate", "x", "--json-schema", "/no/such/file"),
        ("up", "--once"),
        ("up", "--once", "--prompt", "x", "--detach"),
        ("up", "--backend", "abacus"),
        ("nosuch",),
    ],
)
def test_wrong_usage_exits_with_2(terminal: Terminal, arguments: tuple[str, ...]) -> None:
    status, out, err = terminal.run(*arguments)
    assert (status, out) == (2, "")
    assert err


def test_version(terminal: Terminal) -> None:
    assert terminal.run("version")[:2] == (0, "llmos 0.1.0\n")
