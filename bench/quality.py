"""Quality of llmos's default mode and of llama.cpp Q8_0 against transformers in fp32, on the same tokens.

    python -m bench.quality --json

Mean KL divergence over every position of four windows of 512 tokens of the standard library's docstrings, 2,048 in all,
and perplexity on them; for SmolLM2-135M and Gemma 3 270M. `--quick`: two windows of 256, of SmolLM2 only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from bench import command
from bench.corpus import Texts
from bench.divergence import Quality, qualities
from bench.peers.places import MODELS, SMOLLM2, Model
from bench.rows import Row, at_most, bounded, reported
from bench.sides.start import LLAMA_Q8, TRANSFORMERS, Sides, peer, require
from worker.config import WorkerConfig

WINDOWS, TOKENS = 4, 512
QUICK_WINDOWS, QUICK_TOKENS = 2, 256
KL_BOUNDS = {SMOLLM2: 0.005}
"""Nats per token. Gemma's is that of llama.cpp."""
PERPLEXITY_CHANGE = 0.005


def rows(model: Model, ours: Quality, theirs: Quality) -> Iterator[Row]:
    """The verdicts on one model."""
    label = f"{model.label}: "
    if model in KL_BOUNDS:
        yield bounded(f"{label}mean KL to fp32", "nats", ours.kl, KL_BOUNDS[model])
    yield at_most(f"{label}mean KL to fp32, {LLAMA_Q8}", "nats", [ours.kl], [theirs.kl], 1.0)
    yield bounded(f"{label}change of perplexity", "share", abs(ours.perplexity_ratio - 1), PERPLEXITY_CHANGE)
    yield reported(f"{label}perplexity, fp32", "", ours.perplexity, ours.reference_perplexity)
    yield reported(f"{label}perplexity, {LLAMA_Q8}", "", ours.perplexity, theirs.perplexity)


def measure(quick: bool, only: str, precision: str, versions: list[str]) -> Iterator[Row]:
    """All rows. The reference is started last, so that a missing peer is known first."""
    models = [model for model in (MODELS if not quick else (SMOLLM2,)) if only in model.label]
    require(models, [LLAMA_Q8])
    count, length = (QUICK_WINDOWS, QUICK_TOKENS) if quick else (WINDOWS, TOKENS)
    for model in models:
        with Sides(model, [LLAMA_Q8], precision) as sides, peer(TRANSFORMERS, model) as reference:
            versions.extend([*sides.versions, reference.about["version"]])
            texts = Texts(sides.folder).windows(count, length)
            yield from rows(model, *qualities(reference, [sides.ours, sides.peers[LLAMA_Q8]], texts))


def main() -> int:
    """See `bench.command`."""
    parser = command.parser("quality", __doc__, "512 tokens of SmolLM2 only")
    parser.add_argument("--precision", default=WorkerConfig().precision, help="ours; by default the worker's")
    options = parser.parse_args()
    return command.run(
        "quality", options, lambda versions: measure(options.quick, options.only, options.precision, versions)
    )


if __name__ == "__main__":
    sys.exit(main())
