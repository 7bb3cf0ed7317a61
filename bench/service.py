"""What users notice of a server under load: time to first token, gaps between tokens, goodput. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.client import Trace, gaps

TTFT_BOUND_S = 5.0
GAP_BOUND_S = 0.2
"""A request is good if its first token came within the one and its mean gap is within the other."""


@dataclass(frozen=True, slots=True)
class Service:
    """Of one run. Milliseconds; infinite where a request got no token, or none had two."""

    ttft_p50: float
    ttft_p99: float
    gap_p50: float
    gap_p99: float
    goodput: float
    """Output tokens per second of good requests."""
    throughput: float
    """Output tokens per second of all."""
    failed: int
    """Requests that ended in an error or had not ended when time was up."""


def service(traces: Sequence[Trace], start_s: float, end_s: float) -> Service:
    """Of the requests of a run; tokens count if they came between `start_s` and `end_s`."""
    waits = [trace.times_s[0] - trace.due_s if trace.times_s else math.inf for trace in traces]
    pauses = [pause for trace in traces for pause in gaps(trace)] or [math.inf]
    counted = {id(trace): _tokens(trace, start_s, end_s) for trace in traces}
    return Service(
        ttft_p50=1000 * statistics.median(waits),
        ttft_p99=1000 * percentile(waits, 0.99),
        gap_p50=1000 * statistics.median(pauses),
        gap_p99=1000 * percentile(pauses, 0.99),
        goodput=sum(counted[id(trace)] for trace in traces if good(trace)) / (end_s - start_s),
        throughput=sum(counted.values()) / (end_s - start_s),
        failed=sum(not trace.finished for trace in traces),
    )


def good(trace: Trace) -> bool:
    """Whether a request was served as promised, as far as it got."""
    if not trace.times_s or trace.error or trace.times_s[0] - trace.due_s > TTFT_BOUND_S:
        return False
    return statistics.fmean(gaps(trace)) <= GAP_BOUND_S if len(trace.times_s) > 1 else True


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def _tokens(trace: Trace, start_s: float, end_s: float) -> float:
    """Tokens of a request in an interval. Events may bring several tokens; a finished request got all it asked for."""
    if not trace.times_s:
        return 0.0
    inside = sum(start_s <= moment <= end_s for moment in trace.times_s) / len(trace.times_s)
    return inside * (trace.output_tokens if trace.finished else len(trace.times_s))
