"""The precision plan of a version, measured once, in a child process: this one never imports torch."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import msgspec

from llmos.errors import MissingExtra, SourceError
from llmos.store import child
from llmos.store.importer import turn
from llmos.store.manifest import Manifest
from llmos.store.precision import PlanRecord
from llmos.store.progress import Progress, Silent
from llmos.store.store import Store

NEEDED = ("torch", "transformers", "tokenizers")
FAMILIES = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"}
)
"""What the kernels of `worker.kernels` can run, if it has the right sizes."""
GROUP, HEAD_MULTIPLE = 64, 16
"""Divisors of the hidden size and of an attention head's width."""


def plannable(entry: Manifest) -> bool:
    """Whether a plan can be worth more than fp32 for this version, as far as its manifest tells."""
    fits = entry.hidden_size % GROUP == 0 and entry.head_dim % HEAD_MULTIPLE == 0
    return entry.architecture in FAMILIES and fits and entry.adapter is None


def ensure_plan(store: Store, entry: Manifest, progress: Progress | None = None) -> PlanRecord | None:
    """The plan of a version, measured now if the store has none; None for a version that is computed in fp32 anyway.

    Whoever else measures it is waited for. Raises `MissingExtra`, `StoreBusy`, or `SourceError` if the model cannot be
    measured here.
    """
    watched = progress or Silent()
    if (found := store.plan(entry)) is not None:
        return found
    if not plannable(entry):
        return None
    if any(importlib.util.find_spec(module) is None for module in NEEDED):
        raise MissingExtra("worker", "Measuring a model's precision")
    try:
        with turn(store, f"plan-{entry.version}", watched) as work:
            if (found := store.plan(entry)) is not None:
                return found
            record = _measured(store.materialize(entry), entry, work, watched)
            store.keep_plan(record)
            return record
    except OSError as error:
        raise SourceError(f"The plan cannot be stored: {error.strerror or error}.") from error


def _measured(folder: Path, entry: Manifest, work: Path, progress: Progress) -> PlanRecord:
    def show(line: str) -> None:
        if line.startswith('{"stage"'):
            stage = json.loads(line)
            progress.stage(stage["stage"], stage["total"], in_bytes=False)
        elif line.startswith('{"advance"'):
            progress.advance(json.loads(line)["advance"])

    out, log = work / "plan.json", work / "plan.log"
    command = [sys.executable, "-P", "-m", "worker.precision", "--folder", str(folder), "--version", entry.version]
    if child.run([*command, "--out", str(out)], log, show) != 0:
        raise SourceError(f"The precision of {entry.name or 'the model'} was not measured: {child.last_line(log)}")
    return msgspec.json.decode(out.read_bytes(), type=PlanRecord)
