"""`llmos chat` at a real terminal: a pseudo-terminal whose other end the test holds."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.scripted_gateway import ScriptedGateway, scripted_gateway

DEADLINE_S = 50.0


class Session:
    """The command with a terminal; `expect` reads what it shows."""

    def __init__(self, address: str, home: Path, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "LLMOS_ADDRESS": address, "XDG_STATE_HOME": str(home), "TERM": "dumb"}
        command = [sys.executable, "-m", "llmos.cli.main", *arguments]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)
        self._shown = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def expect(self, text: str) -> str:
        """Read until `text` shows; returns what showed up to it."""
        deadline = time.monotonic() + DEADLINE_S
        while text not in self._shown:
            left = deadline - time.monotonic()
            assert left > 0, f"waited in vain for {text!r}; shown: {self._shown!r}"
            if select.select([self._ours], [], [], left)[0]:
                self._shown += os.read(self._ours, 4096).decode()
        before, _, self._shown = self._shown.partition(text)
        return before

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)
        os.close(self._ours)


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with scripted_gateway() as gateway:
        yield gateway
        gateway.may_finish.set()


@pytest.fixture
def chat(gateway: ScriptedGateway, tmp_path: Path) -> Iterator[Session]:
    session = Session(gateway.address, tmp_path, "chat")
    yield session
    session.close()


def test_a_conversation(chat: Session, gateway: ScriptedGateway) -> None:
    chat.expect("> ")
    chat.type("one\n")
    chat.expect("Paris")
    chat.expect("> ")
    chat.type("/what\n")
    chat.expect("/clear forgets")
    chat.expect("> ")
    chat.type("/exit\n")
    assert chat.process.wait(DEADLINE_S) == 0
    assert len(gateway.asked) == 1


def test_ctrl_c_stops_the_answer_and_not_the_chat(chat: Session, gateway: ScriptedGateway) -> None:
    gateway.may_finish.clear()
    chat.expect("> ")
    chat.type("one\n")
    chat.expect("Paris")
    chat.process.send_signal(signal.SIGINT)
    chat.expect("> ")
    assert gateway.ended.wait(DEADLINE_S)
    gateway.may_finish.set()
    chat.type("two\n")
    chat.expect("Paris")
    chat.expect("> ")
    chat.type("\x04")
    assert chat.process.wait(DEADLINE_S) == 0
    assert [len(request.messages) for request in gateway.asked] == [1, 1]


def test_an_answer_cannot_steer_the_terminal(chat: Session, gateway: ScriptedGateway) -> None:
    gateway.pieces = ["\x1b]0;owned\x07", "Paris"]
    chat.expect("> ")
    chat.type("one\n")
    assert "\x1b]0;" not in chat.expect("Paris")
