from __future__ import annotations

import json

import pytest

from llmos.cli import output
from llmos.v1 import fleet_pb2, inference_pb2


@pytest.mark.parametrize(
    ("enum", "value", "name"),
    [
        (fleet_pb2.NodeRole, fleet_pb2.NODE_ROLE_WORKER, "worker"),
        (fleet_pb2.NodeState, fleet_pb2.NODE_STATE_READY, "ready"),
        (fleet_pb2.DeviceKind, fleet_pb2.DEVICE_KIND_GPU, "gpu"),
        (fleet_pb2.ModelState, fleet_pb2.MODEL_STATE_LOADED, "loaded"),
        (inference_pb2.FinishReason, inference_pb2.FINISH_REASON_LENGTH, "length"),
        (fleet_pb2.NodeRole, 99, "unknown"),
    ],
)
def test_enums_have_lower_case_names(enum: object, value: int, name: str) -> None:
    assert output.enum_name(enum, value) == name


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert output.printable("a\x1b[31mb\r\x07\tc\nd\x9b") == "a[31mb\tc\nd"


def test_text_for_a_pipe_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    output.write("a\x1bb")
    assert capsys.readouterr().out == "a\x1bb"


def test_an_error_is_one_line_and_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.error("first\n  \x1bsecond")
    assert capsys.readouterr().err == "llmos: first second\n"


def test_json_keeps_letters_of_all_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json([{"id": "é"}])
    text = capsys.readouterr().out
    assert "é" in text
    assert json.loads(text) == [{"id": "é"}]


def test_a_table_shows_whole_cells_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 60
    output.print_table(["ID", "STATE"], [[long, "[bold]ready"]], empty="nothing")
    shown = capsys.readouterr().out
    assert long in shown
    assert "[bold]ready" in shown


def test_an_empty_table_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(["ID"], [], empty="no requests")
    assert capsys.readouterr().out == "no requests\n"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (40 * 2**30, "40.0 GiB"), (2**50, "1024.0 TiB")],
)
def test_bytes(count: int, text: str) -> None:
    assert output.bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0000005, "0 µs"), (0.0125, "12.5 ms"), (2.5, "2.50 s"), (90, "1.5 min")]
)
def test_seconds(seconds: float, text: str) -> None:
    assert output.seconds_text(seconds) == text
