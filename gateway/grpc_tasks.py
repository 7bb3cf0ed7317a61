"""Vectors, labels and scores as public gRPC messages."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.tasks import Results
from llmos.v1 import inference_pb2 as pb


def embed_response(results: Results) -> pb.EmbedResponse:
    """Vectors, in the order of the inputs."""
    return pb.EmbedResponse(embeddings=[pb.Embedding(values=row) for row in results.rows], usage=_usage(results))


def classify_response(results: Results) -> pb.ClassifyResponse:
    """Labels, the likeliest of each input first."""
    labels = results.model.labels
    return pb.ClassifyResponse(
        classifications=[_classified(row, labels) for row in results.rows], usage=_usage(results)
    )


def score_response(results: Results) -> pb.ScoreResponse:
    """Scores, in the order of the texts."""
    return pb.ScoreResponse(scores=[row[0] for row in results.rows], usage=_usage(results))


def _classified(probabilities: Sequence[float], labels: Sequence[str]) -> pb.Classification:
    order = sorted(range(len(labels)), key=lambda number: -probabilities[number])
    return pb.Classification(labels=[pb.LabelScore(label=labels[n], score=probabilities[n]) for n in order])


def _usage(results: Results) -> pb.Usage:
    return pb.Usage(prompt_tokens=results.prompt_tokens)
