"""The search for a plan: cheap when int8 is good enough, bounded when it is not."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from llmos.store.precision import PrecisionPlan
from worker.quality.distance import Distance
from worker.quality.search import Bound, Sensitivity, search

LAYERS = 4


def distance(kl: float, ratio: float = 1.0) -> Distance:
    return Distance(kl=kl, perplexity=ratio, reference_perplexity=1.0, agreement=1.0, tokens=1)


class Model:
    """int8 costs each matrix its share; the ranking may be off by `bias`. fp16 costs `floor` altogether."""

    def __init__(
        self, shares: Mapping[str, float], *, floor: float = 0.0, bias: float = 1.0, ratio: float = 1.0
    ) -> None:
        names = [name for name, _ in PrecisionPlan.uniform("int8", LAYERS).matrices()]
        self.shares = {name: shares.get(name, 0.0) for name in names}
        self.floor, self.bias, self.ratio = floor, bias, ratio
        self.measured: list[PrecisionPlan] = []

    def measure(self, plan: PrecisionPlan) -> Distance:
        self.measured.append(plan)
        cost = sum(self.shares[name] for name, kind in plan.matrices() if kind == "int8")
        return distance(cost + self.floor, self.ratio if cost else 1.0)

    def rank(self) -> Mapping[str, Sensitivity]:
        return {name: Sensitivity(share**self.bias, 64) for name, share in self.shares.items()}

    def run(self) -> tuple[PrecisionPlan, Distance | None]:
        return search(LAYERS, self.measure, self.rank, Bound())


def wide(plan: PrecisionPlan) -> set[str]:
    return {name for name, kind in plan.matrices() if kind == "fp16"}


def test_int8_everywhere_takes_one_measurement() -> None:
    model = Model({"head": 0.004})
    plan, found = model.run()
    assert plan == PrecisionPlan.uniform("int8", LAYERS)
    assert found == distance(0.004)
    assert len(model.measured) == 1


def test_the_most_sensitive_matrices_are_promoted_and_no_others() -> None:
    plan, found = Model({"layers.2.down": 0.2, "head": 0.002, "layers.0.qkv": 0.001}).run()
    assert wide(plan) == {"layers.2.down"}
    assert found == distance(pytest.approx(0.003))


def test_a_ranking_that_is_off_costs_measurements_not_the_bound() -> None:
    model = Model({"head": 0.03, "layers.1.out": 0.02, "layers.3.gate_up": 0.02}, bias=0.05)
    plan, found = model.run()
    assert found is not None
    assert found.kl <= 0.005
    assert len(model.measured) <= 7
    assert plan == model.measured[-1]


def test_perplexity_counts_too() -> None:
    plan, found = Model({"head": 0.001, "layers.0.out": 0.001}, ratio=0.99).run()
    assert wide(plan)
    assert found is not None
    assert found.perplexity_ratio == 1


@pytest.mark.parametrize("floor", [0.006, float("nan"), float("inf")])
def test_what_not_even_fp16_can_do_is_fp32(floor: float) -> None:
    model = Model({"head": 0.1}, floor=floor)
    assert model.run() == (PrecisionPlan.uniform("fp32", LAYERS), None)
    assert len(model.measured) <= 7
