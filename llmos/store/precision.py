"""In which precision each matrix of a model version is computed: a typed document beside the version's manifest.

The plan is part of what a version is (`identity`), what was measured when it was made is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Literal

import msgspec

Kind = Literal["fp32", "fp16", "int8"]
"""int8: weights in groups of 64 inputs with a scale each, activations in int16 with a scale per row."""
Precision = Literal["auto", "fp32", "fp16", "int8"]
"""What a worker is asked to serve in; `auto` is each version's plan."""
ROLES = ("qkv", "out", "gate_up", "down")
"""Matrices of a layer: into and out of attention, into and out of the MLP."""
HEAD = "head"
DIGITS = 16
"""Of a plan's hash, in an identity."""


class LayerPrecision(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one decoder layer."""

    qkv: Kind
    out: Kind
    gate_up: Kind
    down: Kind


class PrecisionPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of all matrices of a model. Matrices are named `head` and `layers.N.ROLE`."""

    head: Kind
    """Output layer and token embedding, which often are one matrix."""
    layers: tuple[LayerPrecision, ...]

    @classmethod
    def uniform(cls, kind: Kind, layers: int) -> PrecisionPlan:
        """Everything in one precision."""
        return cls(head=kind, layers=(LayerPrecision(qkv=kind, out=kind, gate_up=kind, down=kind),) * layers)

    def matrices(self) -> Iterator[tuple[str, Kind]]:
        """Name and precision of every matrix."""
        yield HEAD, self.head
        for number, layer in enumerate(self.layers):
            for role in ROLES:
                yield f"layers.{number}.{role}", getattr(layer, role)

    def changed(self, kinds: Mapping[str, Kind]) -> PrecisionPlan:
        """The plan with other precisions for the matrices of these names. Raises KeyError for an unknown one."""
        merged = dict(self.matrices())
        if unknown := kinds.keys() - merged.keys():
            raise KeyError(f"the plan has no {', '.join(sorted(unknown))}")
        merged.update(kinds)
        layers = (
            LayerPrecision(**{role: merged[f"layers.{number}.{role}"] for role in ROLES})
            for number in range(len(self.layers))
        )
        return PrecisionPlan(head=merged[HEAD], layers=tuple(layers))

    @property
    def exact(self) -> bool:
        """Whether everything is fp32: transformers' own modules compute it."""
        return all(kind == "fp32" for _, kind in self.matrices())

    @property
    def digest(self) -> str:
        """SHA-256 of the plan, in hex."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


class Measured(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far the planned model is from fp32, on the texts of `worker.quality.corpus`."""

    kl: float
    """Mean over all positions, in nats."""
    perplexity_ratio: float
    """Planned to fp32."""
    tokens: int
    weight_bytes: int
    """Memory of the planned model's weights."""


class PlanRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the store keeps: the plan of a version and why it is this one."""

    version: str
    """Of the manifest."""
    plan: PrecisionPlan
    measured: Measured | None = None
    """None: nothing had to be measured, because the model is computed in fp32."""
    reason: str = ""
    """Why the plan is all fp32, if it is."""


def identity(version: str, plan: PrecisionPlan | None) -> str:
    """What decides a version's bytes: the hash of its manifest and, unless all is fp32, that of its plan."""
    return version if plan is None or plan.exact else f"{version}+{plan.digest[:DIGITS]}"


def content_version(identity_or_version: str) -> str:
    """The manifest's version in an identity."""
    return identity_or_version.partition("+")[0]
