"""Each engine's own HTTP server, alone on the machine, with two threads and room for sixteen requests at once."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.client import Target, Trace, send
from bench.machine import vllm_dtype
from bench.mix import OUTPUT_TOKENS, PROMPT_TOKENS
from bench.peers import places
from bench.peers.places import Model
from bench.sides.side import SideError
from bench.sides.start import THREADS, folder

OURS, LLAMA, VLLM = "llmos up", "llama-server Q8_0", "vLLM server"
PEERS = (LLAMA, VLLM)
SLOTS = 16
"""Requests that a server computes at once; ours takes as many as fit."""
CONTEXT = PROMPT_TOKENS[1] + OUTPUT_TOKENS[1] + 32
START_S = 900.0
STOP_S = 30.0
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "ignore_eos": True}
"""Sampled, since greedy text of a small model soon repeats itself, which no user's does."""


class ServerError(SideError):
    """A server did not start, or failed what it was asked; the text names it."""


@contextmanager
def serving(name: str, model: Model) -> Iterator[Target]:
    """A server that has answered once; ended afterwards with all its processes. Raises MissingPeer, ServerError."""
    port = free_port()
    with tempfile.TemporaryDirectory() as scratch:
        command, fields = _command(name, model, port, Path(scratch))
        target = Target(port, {"model": model.name, **_SAMPLING, **fields})
        with (Path(scratch) / "log").open("w+") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=_environ(name), start_new_session=True
            )
            try:
                _await(name, process, target, Path(scratch) / "log")
                yield target
            finally:
                end(process)


def require(model: Model, peers: Sequence[str]) -> None:
    """Raise MissingPeer or ModelNotFound, if something is not there."""
    folder(model)
    for name in peers:
        _command(name, model, 0, Path())


def _command(name: str, model: Model, port: int, scratch: Path) -> tuple[list[str], Mapping[str, object]]:
    """How it is started, and the fields that its requests need besides everybody's."""
    if name == OURS:
        options = ["--http-port", str(port), "--grpc-port", str(free_port()), "--data-dir", str(scratch / "fleet")]
        return [sys.executable, "-m", "llmos.cli.main", "up", "--model", model.name, *options], {}
    if name == LLAMA:
        size = ["--parallel", str(SLOTS), "--ctx-size", str(SLOTS * CONTEXT)]
        threads = ["--threads", str(THREADS), "--threads-batch", str(THREADS), "--threads-http", "2"]
        command = [str(places.llama_server()), "--model", str(model.gguf("q8_0")), *size, *threads, "--no-webui"]
        return [*command, "--host", "127.0.0.1", "--port", str(port)], {"top_k": 0, "min_p": 0.0}
    size = ["--max-num-seqs", str(SLOTS), "--max-model-len", str(CONTEXT), "--gpu-memory-utilization", "0.3"]
    size += ["--dtype", vllm_dtype()]
    command = [str(places.python("vllm")), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder(model))]
    return [*command, *size, "--served-model-name", model.name, "--host", "127.0.0.1", "--port", str(port)], {}


def _environ(name: str) -> dict[str, str]:
    own = {"PYTHONPATH": str(places.ROOT)} if name == OURS else {}
    if name == VLLM:
        own = {"OMP_NUM_THREADS": str(THREADS), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "2"}
    return {**os.environ, **own}


def _await(name: str, process: subprocess.Popen[bytes], target: Target, log: Path) -> None:
    """Until it has answered a request."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        trace = Trace(0.0, 2)
        asyncio.run(asyncio.wait_for(send(target, "Hello", 1, trace), START_S))
        if trace.finished:
            return
        time.sleep(0.5)
    raise ServerError(f"{name} did not start: {' / '.join(log.read_text(errors='replace').splitlines()[-5:])[-1000:]}")


def end(process: subprocess.Popen[bytes]) -> None:
    """As from the terminal; what is left of its process group then is killed."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
