"""Child processes of an import: lines as they come, no orphan when the importer leaves."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from llmos.errors import SourceError
from llmos.store import child, conversion
from llmos.store.progress import Silent
from tests.fakes.models import gguf_header
from tests.fakes.store import Recorder


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def test_lines_arrive_and_the_status_is_returned(tmp_path: Path) -> None:
    lines: list[str] = []
    code = "import sys; print('one'); print('two'); sys.stderr.write('why\\n\\n'); sys.exit(3)"
    assert child.run(python(code), tmp_path / "log", lines.append) == 3
    assert lines == ["one", "two"]
    assert child.last_line(tmp_path / "log") == "why"


def test_a_silent_child_has_said_nothing(tmp_path: Path) -> None:
    assert child.run(python("pass"), tmp_path / "log", lambda _: None) == 0
    assert child.last_line(tmp_path / "log") == "it said nothing"


@pytest.mark.parametrize("ignores_sigterm", [False, True])
def test_an_interrupted_importer_leaves_no_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ignores_sigterm: bool
) -> None:
    monkeypatch.setattr(child, "KILL_AFTER_S", 0.2)
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " if ignores_sigterm else ""
    code = f"import os, signal; {ignore}print(os.getpid()); signal.pause()"
    started: list[int] = []

    def interrupt(line: str) -> None:
        started.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        child.run(python(code), tmp_path / "log", interrupt)
    assert not psutil.pid_exists(started[0])


def test_the_converters_lines_become_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(_command: object, _log: Path, on_line: object) -> int:
        assert callable(on_line)
        for line in [
            '{"step": 1, "steps": 3, "label": "a"}',
            "noise",
            '{"step": 2, "steps": 3}',
            '{"step": 3, "steps": 3}',
        ]:
            on_line(line)
        return 0

    monkeypatch.setattr(child, "run", fake)
    monkeypatch.setattr(conversion, "require_converter", lambda: None)
    progress = Recorder()
    conversion.convert(tmp_path / "a.gguf", tmp_path / "out", progress)
    assert progress.stages == [("converting", 3)]
    assert progress.complete()


@pytest.mark.torch
def test_what_the_real_converter_refuses_is_one_clear_error(tmp_path: Path) -> None:
    gguf = tmp_path / "odd.gguf"
    gguf.write_bytes(gguf_header({"general.architecture": "no-such-thing"}))
    with pytest.raises(SourceError, match=r"odd\.gguf could not be converted: .*no-such-thing"):
        conversion.convert(gguf, tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()
