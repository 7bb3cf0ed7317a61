"""Sides by name, with their models loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.machine import vllm_dtype
from bench.peers import places
from bench.peers.places import Model
from bench.sides.side import Side
from llmos.errors import ModelNotFound
from llmos.store import Store, default_store_path, import_model

LLAMA_Q8, LLAMA_F16, VLLM, TRANSFORMERS = "llama.cpp Q8_0", "llama.cpp F16", "vLLM", "transformers"
EVERYBODY = (LLAMA_Q8, LLAMA_F16, VLLM, TRANSFORMERS)
THREADS = 2
"""Of every side."""


def folder(model: Model) -> Path:
    """The model's files in the store, imported at first use. Raises SourceError if they can't be had."""
    store = Store(default_store_path())
    try:
        found = store.resolve(model.name)
    except ModelNotFound:
        print(f"importing {model.label} from {model.source}", file=sys.stderr)
        found = import_model(store, model.source, name=model.name)
    return store.materialize(found)


def ours(files: Path, precision: str, *, drafting: bool = False) -> Side:
    """llmos's engine, driven as the worker drives it."""
    side = Side("llmos", [sys.executable, "-m", "bench.sides.ours"])
    return side.load(files, THREADS, precision=precision, drafting=drafting)


def peer(name: str, model: Model) -> Side:
    """One of `EVERYBODY`. Raises MissingPeer or SourceError."""
    if name in (LLAMA_Q8, LLAMA_F16):
        command = [str(places.python("llama_cpp")), "-m", "bench.sides.llama_cpp"]
        return Side(name, command).load(model.gguf(_kind(name)), THREADS)
    if name == VLLM:
        environ = {
            "OMP_NUM_THREADS": str(THREADS),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        side = Side(
            name, [str(places.python("vllm")), "-m", "bench.sides.vllm"], environ | {"VLLM_CPU_KVCACHE_SPACE": "2"}
        )
        return side.load(folder(model), THREADS, dtype=vllm_dtype())
    return Side(name, [sys.executable, "-m", "bench.sides.transformers"]).load(folder(model), THREADS)


def require(models: Iterable[Model], peers: Iterable[str]) -> None:
    """Raise MissingPeer or ModelNotFound before anything is measured, if something is not there."""
    for model in models:
        for name in peers:
            if name in (LLAMA_Q8, LLAMA_F16):
                places.python("llama_cpp")
                model.gguf(_kind(name))
            elif name == VLLM:
                places.python("vllm")
        folder(model)


def _kind(name: str) -> str:
    return name.split()[1].lower()


class Sides:
    """The processes of one model's sides; ended together."""

    def __init__(self, model: Model, peers: Sequence[str], precision: str) -> None:
        self.model = model
        self.folder = folder(model)
        with ExitStack() as stack:
            self.ours = stack.enter_context(ours(self.folder, precision))
            self.peers = {name: stack.enter_context(peer(name, model)) for name in peers}
            self._stack = stack.pop_all()

    @property
    def versions(self) -> list[str]:
        """What each side said of itself, ours first."""
        return [str(one.about["version"]) for one in (self.ours, *self.peers.values())]

    def __enter__(self) -> Sides:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
