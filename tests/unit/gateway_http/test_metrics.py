"""What passes through an engine is counted, once, whatever its end."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.metrics import MeteredEngine, Metrics
from gateway.types import GenerationRequest, Identity, Params, TraceHeaders, Turn
from llmos.errors import ModelNotFound, Overloaded, Unavailable
from tests.fakes.clock import ManualClock
from tests.fakes.engine import FakeEngine, Script


def samples(metrics: Metrics) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


async def run(engine: FakeEngine, metrics: Metrics, clock: ManualClock, model: str = "tiny", *, read: int = 99) -> None:
    metered = MeteredEngine(engine, metrics, clock)
    request = GenerationRequest("chat", model, Params(n=2), turns=(Turn("user", "x"),))
    generation = await metered.generate(request, Identity("t"), request_id="", trace=TraceHeaders())
    try:
        async for _ in generation.events():
            clock.advance(0.5)
            read -= 1
            if not read:
                break
    finally:
        await generation.aclose()


async def test_a_finished_request() -> None:
    metrics, clock = Metrics(), ManualClock()
    await run(FakeEngine(lambda request: Script(pieces=("a", "b"), finish="length")), metrics, clock)
    got = samples(metrics)
    model = "gen_ai_operation_name=chat,gen_ai_request_model=tiny"
    assert got[f"gen_ai_server_time_to_first_token_seconds_sum{{{model}}}"] == 0.5
    assert got["gen_ai_server_request_duration_seconds_count{error_type=," + model + "}"] == 1
    assert got["gen_ai_server_request_duration_seconds_sum{error_type=," + model + "}"] == 3.5
    assert got[f"gen_ai_server_time_per_output_token_seconds_sum{{{model}}}"] == 1.0
    assert got[f"gen_ai_client_token_usage_sum{{{model},gen_ai_token_type=input}}"] == 5
    assert got[f"gen_ai_client_token_usage_sum{{{model},gen_ai_token_type=output}}"] == 4
    assert got["llmos:prompt_tokens_total{model_name=tiny}"] == 5
    assert got["llmos:generation_tokens_total{model_name=tiny}"] == 4
    assert got["llmos:request_success_total{finished_reason=length,model_name=tiny}"] == 2
    assert got["llmos:num_requests_running{model_name=tiny}"] == 0
    assert got["llmos:num_requests_waiting{model_name=tiny}"] == 0
    assert not any("request_failure" in name for name in got)


async def test_a_refused_request() -> None:
    metrics = Metrics()
    with pytest.raises(Overloaded):
        await run(FakeEngine(lambda request: Script(refuse=Overloaded("full"))), metrics, ManualClock())
    got = samples(metrics)
    assert got["llmos:request_failure_total{code=overloaded,model_name=tiny}"] == 1
    assert got["llmos:num_requests_waiting{model_name=tiny}"] == 0


async def test_names_of_models_that_are_not_served_make_no_series() -> None:
    metrics = Metrics()
    with pytest.raises(ModelNotFound):
        await run(FakeEngine(), metrics, ManualClock(), model="made-up")
    assert "made-up" not in metrics.text().decode()
    assert samples(metrics)["llmos:request_failure_total{code=model_not_found,model_name=}"] == 1


async def test_a_request_that_breaks_and_one_that_is_left() -> None:
    metrics = Metrics()
    with pytest.raises(Unavailable):
        await run(FakeEngine(lambda request: Script(fail=Unavailable("lost"))), metrics, ManualClock())
    await run(FakeEngine(), metrics, ManualClock(), read=3)
    got = samples(metrics)
    assert got["llmos:request_failure_total{code=unavailable,model_name=tiny}"] == 1
    assert got["llmos:request_failure_total{code=cancelled,model_name=tiny}"] == 1
    assert got["llmos:num_requests_running{model_name=tiny}"] == 0


async def test_running_and_waiting_are_told_apart() -> None:
    metrics, hold = Metrics(), asyncio.Event()
    engine = FakeEngine(lambda request: Script(hold_start=hold))
    task = asyncio.create_task(run(engine, metrics, ManualClock()))
    await engine.began.wait()
    assert samples(metrics)["llmos:num_requests_waiting{model_name=tiny}"] == 1
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert samples(metrics)["llmos:num_requests_waiting{model_name=tiny}"] == 0


def test_counters_of_other_parts_are_shown() -> None:
    metrics = Metrics()
    metrics.watch("link", lambda: {"connects": 3, "outbox": 2}, gauges={"outbox"})
    got = samples(metrics)
    assert got["llmos:link_connects_total{}"] == 3
    assert got["llmos:link_outbox{}"] == 2
