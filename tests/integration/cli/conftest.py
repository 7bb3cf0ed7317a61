"""Commands run in the test's process against a gateway with canned answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmos.cli import main
from tests.fakes.scripted_gateway import ScriptedGateway, scripted_gateway


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ScriptedGateway]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with scripted_gateway() as gateway:
        monkeypatch.setenv("LLMOS_ADDRESS", gateway.address)
        yield gateway


class Terminal:
    """Runs the command in this process, as the installed script would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """(exit status, stdout, stderr)"""
        self._monkeypatch.setattr(sys, "argv", ["llmos", *arguments])
        with pytest.raises(SystemExit) as left:
            main.main()
        captured = self._capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    def type(self, text: str) -> None:
        import io

        self._monkeypatch.setattr(sys, "stdin", io.StringIO(text))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys)
