"""Progress as it is drawn: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from llmos.cli.progress import Drawn, Lines, shown


def test_lines_tell_stages_and_quarters(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    lines.stage("downloading x", 4096)
    for _ in range(8):
        lines.advance(512)
    lines.stage("converting", 3, in_bytes=False)
    lines.stage("asking", None)
    lines.advance(5)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "downloading x (4.0 KiB)",
        "downloading x: 25 %",
        "downloading x: 50 %",
        "downloading x: 75 %",
        "converting",
        "asking",
    ]


def test_a_bar_per_stage_and_every_one_ends_full() -> None:
    bars = Progress(
        TextColumn("{task.description} {task.fields[amount]}"), console=Console(file=io.StringIO(), force_terminal=True)
    )
    drawn = Drawn(bars)
    drawn.stage("downloading x", None)
    drawn.stage("downloading x", 2048)
    drawn.advance(1024)
    assert [task.fields["amount"] for task in bars.tasks] == ["1.0 KiB of 2.0 KiB"]
    drawn.advance(1024)
    drawn.stage("converting", 3, in_bytes=False)
    drawn.advance(1)
    assert bars.tasks[1].fields["amount"] == "1 of 3"
    drawn.finish()
    assert [task.description for task in bars.tasks] == ["downloading x", "converting"]
    assert all(task.finished for task in bars.tasks)


def test_without_a_terminal_there_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with shown() as progress:
        progress.stage("hashing", 10)
    assert capsys.readouterr().err == "hashing (10 B)\n"
