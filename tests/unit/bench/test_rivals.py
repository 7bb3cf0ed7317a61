"""Each rival's rule on an example that can be checked by hand."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from bench.rivals.block_cost import BlockCost
from bench.rivals.cache_aware import CacheAware
from bench.rivals.power_of_two import PowerOfTwo
from bench.rivals.round_robin import RoundRobin
from bench.rivals.rule import Routed, Rule
from bench.rivals.weighted import Weighted
from bench.simulated.cost import StepCost
from bench.simulated.engine import Engine, Step
from bench.simulated.fleet import Start
from bench.simulated.job import Job
from bench.simulated.traffic import Bounds, Request
from bench.simulated.workloads import blocks

pytestmark = pytest.mark.torch

RNG = random.Random(0)


def ask(name: str, prompt: int = 256, stream: int = 1) -> Request:
    return Request(name, "t", prompt, blocks(stream, 0, prompt // 64), 10, 64, Bounds(1.0, 1.0))


def send(rule: Rule, *requests: Request) -> list[int]:
    """Where they go, one after the other, none of them ending."""
    routed = Routed(rule)
    orders = [order for request in requests for order in routed.submitted(request, 0.0)]
    return [order.worker for order in orders if isinstance(order, Start)]


def told(rule: Rule, worker: int, step: Step) -> None:
    Routed(rule).stepped(worker, step, Engine(8, StepCost(1, 0, 0, 0, 0, 0)), 0.0)


def test_round_robin_takes_turns() -> None:
    went = send(RoundRobin(3, RNG), *(ask(f"r{number}") for number in range(6)))
    assert went[:3] == went[3:] and sorted(went[:3]) == [0, 1, 2]


def test_two_choices_never_take_the_most_loaded() -> None:
    rule = PowerOfTwo(3, RNG)
    rule.seen[1].pending = {"a": ask("a"), "b": ask("b")}
    assert 1 not in send(rule, ask("c"), ask("d"))
    by_tokens = PowerOfTwo(2, RNG, tokens=True)
    by_tokens.seen[0].pending = {"long": ask("long", 2000)}
    by_tokens.seen[1].pending = {"x": ask("x", 64), "y": ask("y", 64)}
    assert send(by_tokens, ask("c", 64)) == [1]


def test_the_tree_sends_to_the_longest_match_until_out_of_balance() -> None:
    rule = CacheAware(2, RNG, cache_threshold=0.5, balance_abs_threshold=2, balance_rel_threshold=1.5)
    went = send(rule, *(ask(f"r{number}") for number in range(5)))
    assert went[:3] == [went[0]] * 3, "the same prefix, and in balance"
    assert went[3] == 1 - went[0], "3 - 0 > 2 and 3 > 1.5 * 0"
    other = ask("other", stream=2)
    assert send(CacheAware(2, RNG, cache_threshold=0.5), ask("first"), other) in ([0, 1], [1, 0]), "the smaller tree"


def test_the_tree_forgets_what_was_sent_longest_ago() -> None:
    rule = CacheAware(1, RNG, tree_blocks=4)
    send(rule, ask("a", stream=1), ask("b", 128, stream=2))
    assert [rule._match(rule._trees[0], ask("x", stream=stream)) for stream in (1, 2)] == [2, 2]


def test_block_cost_weighs_prefill_against_blocks_in_use() -> None:
    rule = BlockCost(2, RNG, overlap_weight=1.0)
    told(rule, 0, Step(stored=blocks(1, 0, 3)))
    request = ask("a")
    assert rule.cost(0, request) == pytest.approx(1 * (256 - 192) / 64 + 4 + 1)
    assert rule.cost(1, request) == pytest.approx(1 * 256 / 64 + 4 + 1)
    assert send(rule, request) == [0]
    # The same again: 0 has 1 block to prefill before it, and all four of its blocks in use already.
    assert rule.cost(0, ask("b")) == pytest.approx(1 + 1 + 4 + 1 + 1)
    told(rule, 0, Step(first=[Job("a", 256, [], 10, 64)]))
    # The router expects no more prefill of `a` once its first token is here.
    assert rule.cost(0, ask("b")) == pytest.approx(1 + 4 + 1 + 1)
    rule.ended(0, request)
    assert rule.cost(0, ask("b")) == pytest.approx(1 + 4 + 1)


def test_block_cost_with_a_temperature_draws_the_cheaper_one_more_often() -> None:
    rule = BlockCost(2, random.Random(1), temperature=0.5)
    drawn = Counter(rule._draw([10.0, 20.0]) for _ in range(2000))
    assert drawn[0] / 2000 == pytest.approx(1 / (1 + 2.718281828**-2), abs=0.03)


def test_weighted_scores_leave_out_who_is_saturated() -> None:
    rule = Weighted(3, RNG, prefix=3.0, queue=2.0, kv=2.0, queue_threshold=5, kv_threshold=0.8)
    told(rule, 0, Step(stored=blocks(1, 0, 4)))
    assert send(rule, ask("a")) == [0], "prefix 3 + queue 2 + kv 2 against 4"
    rule.seen[0].waiting = 6
    rule.seen[1].kv_usage = 0.5
    assert send(rule, ask("b")) == [2], "0 is saturated; 1 has fewer free blocks than 2"
    for seen in rule.seen:
        seen.waiting = 9
    assert send(rule, ask("c")) == [0], "all are saturated, so that none is left out"


def test_weighted_scores_see_metrics_as_of_the_last_scrape() -> None:
    engine = Engine(10, StepCost(1, 0, 0, 0, 0, 0))
    rule = Weighted(1, RNG)
    routed = Routed(rule)
    for name in ("a", "b"):
        engine.admit(Job(name, 600, [], 10, 40))
    engine.begin()
    assert (rule.seen[0].waiting, rule.seen[0].kv_usage) == (0, 0.0)
    assert not list(routed.ticked([engine], 0.05))
    assert (rule.seen[0].waiting, rule.seen[0].kv_usage) == (1, 0.2)


def test_a_router_knows_what_it_sent_and_what_has_ended() -> None:
    rule = RoundRobin(1, RNG)
    routed = Routed(rule)
    routed.submitted(ask("a"), 0.0)
    assert rule.seen[0].prefilling == {"a": 256}
    engine = Engine(8, StepCost(1, 0, 0, 0, 0, 0))
    routed.stepped(0, Step(first=[Job("a", 256, [], 1, 1)], stored=[1, 2], removed=[3]), engine, 0.0)
    assert rule.seen[0].prefilling == {} and list(rule.seen[0].pending) == ["a"]
    routed.stepped(0, Step(finished=[Job("a", 256, [], 1, 1)], removed=[1]), engine, 0.0)
    assert rule.seen[0].pending == {} and rule.seen[0].cached == {2}
