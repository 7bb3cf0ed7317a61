"""Choose in which precision each matrix of a model is computed, by measuring.

    python -m worker.precision --folder DIR --version VERSION --out FILE

Writes a `llmos.store.precision.PlanRecord`. Progress is one JSON object per line on standard output: `{"stage": "...",
"total": N}` and `{"advance": N}`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch

from llmos import cgroups
from llmos.errors import LlmosError, SourceError
from llmos.store.precision import Measured, PlanRecord, PrecisionPlan
from llmos.store.tensors import read_header
from worker.engine import model as general
from worker.engine.fast import fast_decoder, packing, why_not
from worker.engine.planned import round_weights
from worker.kernels.library import preferred
from worker.quality import corpus
from worker.quality.distance import Distance, Logits, distance, of_decoder, of_transformers
from worker.quality.search import Bound, Sensitivity, search
from worker.quality.sensitivity import sensitivities

_RANKING_TOKENS = 256
_BYTES_PER_PARAMETER = 6
"""Weights in fp32 and packed, and room for one matrix between."""


class Measurement:
    """A model, the texts, and what was measured so far."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.model = _reference(folder)
        self._texts = _texts(folder, self.model)
        self.tokens = sum(map(len, self._texts))
        """Positions of one measurement."""
        self.weight_bytes = 0
        """Of the plan that was measured last; 0 if the kernels could not run it here."""

    def measure(self, plan: PrecisionPlan) -> Distance:
        """How far the plan is from fp32."""
        share = sum(kind != "int8" for _, kind in plan.matrices())
        label = "measuring int8" if not share else f"measuring with {share} matrices in fp16"
        report({"stage": label, "total": self.tokens})
        return distance(of_transformers(self.model), self._planned(plan), self._texts, _advance)

    def rank(self) -> Mapping[str, Sensitivity]:
        """What int8 costs in each matrix."""
        report({"stage": "ranking the matrices", "total": 1})
        ranked = sensitivities(self.model, self._texts[0][:_RANKING_TOKENS])
        _advance(1)
        return ranked

    def _planned(self, plan: PrecisionPlan) -> Logits:
        if preferred():
            decoder = fast_decoder(self.model, kind_of=packing.planned(plan))
            self.weight_bytes = decoder.weight_bytes
            return of_decoder(decoder)
        # Without kernels the plan still is part of the version; rounded weights are all but a thousandth of its cost.
        rounded = _reference(self._folder)
        round_weights(rounded, plan)
        return of_transformers(rounded)


def planned(folder: Path, version: str, bound: Bound) -> PlanRecord:
    """The cheapest plan within the bound. Raises SourceError or UnsupportedFeature if the model cannot be measured."""
    report({"stage": "loading the model", "total": None})
    work = Measurement(folder)
    layers = int(work.model.config.num_hidden_layers)
    exact = PrecisionPlan.uniform("fp32", layers)
    if reason := why_not(work.model):
        return PlanRecord(version=version, plan=exact, reason=reason)
    plan, found = search(layers, work.measure, work.rank, bound)
    if found is None:
        return PlanRecord(version=version, plan=exact, reason="not even fp16 is close enough to fp32")
    measured = Measured(
        kl=found.kl,
        perplexity_ratio=found.perplexity_ratio,
        tokens=found.tokens,
        weight_bytes=work.weight_bytes,
    )
    return PlanRecord(version=version, plan=plan, measured=measured)


def _reference(folder: Path) -> Any:
    model = general.read(folder, torch.device("cpu"))
    model.set_attn_implementation("sdpa")
    return model


def _texts(folder: Path, model: Any) -> Sequence[Sequence[int]]:
    limit = general.context_limit(model.config.get_text_config(), corpus.WINDOW_TOKENS)
    try:
        texts = corpus.windows(folder / "tokenizer.json", length=limit or corpus.WINDOW_TOKENS)
    except Exception as error:  # the library raises no other type
        raise SourceError(f"The tokenizer cannot be used: {error}.") from error
    if min(map(len, texts)) < 2 or max(map(max, texts)) >= model.config.get_text_config().vocab_size:
        raise SourceError("The tokenizer does not fit the model.")
    return texts


def check_memory(folder: Path) -> None:
    """Raises SourceError if the model cannot be measured in the memory that is free."""
    headers = [read_header(path) for path in folder.glob("*.safetensors")]
    parameters = sum(tensor.elements for header in headers for tensor in header)
    free = min(int(psutil.virtual_memory().available), cgroups.read().memory_bytes or sys.maxsize)
    if parameters * _BYTES_PER_PARAMETER > free:
        needed = parameters * _BYTES_PER_PARAMETER / 2**30
        raise SourceError(f"Measuring takes {needed:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free.")


def report(line: Mapping[str, object]) -> None:
    """One line of progress. Fails when the parent is gone, which ends the measurement."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _advance(positions: int) -> None:
    report({"advance": positions})


def main() -> int:
    """Entry point of the process. Returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m worker.precision", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="the model, as the store lays it out")
    parser.add_argument("--version", required=True, help="its version in the store")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    options = parser.parse_args()
    torch.set_num_threads(cgroups.whole_cores(cgroups.read()))
    try:
        check_memory(options.folder)
        record = planned(options.folder, options.version, Bound())
    except LlmosError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    options.out.write_bytes(msgspec.json.encode(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
