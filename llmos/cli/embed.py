"""`llmos embed`: the vectors of texts."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from llmos.cli import output
from llmos.cli.completion import served_models
from llmos.cli.flags import AsJson, DataDir, Timeout

if TYPE_CHECKING:
    from llmos.cli.connection import Target
    from llmos.v1 import inference_pb2 as pb

Model = Annotated[str, typer.Argument(help="A served model that makes vectors.", autocompletion=served_models)]
Texts = Annotated[list[str], typer.Argument(help="Texts; `-` reads one per line from standard input.")]

_SHOWN = 4
_SHOWN_CHARS = 60


def embed(
    model: Model, texts: Texts, timeout: Timeout = 600.0, as_json: AsJson = False, data_dir: DataDir = None
) -> None:
    """Turn texts into vectors."""
    from llmos.cli.connection import find_target

    wanted = [line for text in texts for line in (sys.stdin.read().splitlines() if text == "-" else [text])]
    response = asyncio.run(_embed(find_target(data_dir), model, wanted, timeout))
    vectors = [list(embedding.values) for embedding in response.embeddings]
    if as_json:
        usage = {"prompt_tokens": response.usage.prompt_tokens}
        output.print_json({"model": model, "embeddings": vectors, "usage": usage})
        return
    rows = [
        [text[:_SHOWN_CHARS], str(len(vector)), _first(vector)] for text, vector in zip(wanted, vectors, strict=True)
    ]
    output.print_table(["text", "dimensions", "vector"], rows, empty="no texts")


async def _embed(target: Target, model: str, texts: list[str], timeout_s: float) -> pb.EmbedResponse:
    from llmos.cli.connection import connect
    from llmos.v1 import inference_pb2 as pb

    async with connect(target) as fleet:
        request = pb.EmbedRequest(model=model, inputs=texts)
        return await fleet.inference.Embed(request, metadata=fleet.metadata, timeout=timeout_s)


def _first(vector: list[float]) -> str:
    numbers = " ".join(f"{value:.4f}" for value in vector[:_SHOWN])
    return f"{numbers} ..." if len(vector) > _SHOWN else numbers
