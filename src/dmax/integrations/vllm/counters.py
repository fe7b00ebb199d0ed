"""Forwards and tokens of finished requests in the metrics that vLLM's server gives Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from prometheus_client import Counter, Histogram
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from dmax.outputs import Cost, ratio

Finished = tuple[int, Cost]
"""Generated tokens of a request, and what they cost."""
COUNTERS = {
    "generated_tokens": "Generated tokens of finished requests, without the token that ended them.",
    "denoising_forwards": "Denoising forwards of finished requests.",
    "prefill_forwards": "Forwards that read prompts of finished requests.",
    "commit_forwards": "Forwards that only wrote keys and values of finished blocks.",
}
"""Counters and what they count; TPF is the first over the second."""
TPF_BUCKETS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)


class ForwardCounters(AggregateStatLoggerBase):
    """Counts forwards and tokens of finished requests for Prometheus.

    Args:
        vllm_config: names the model.
        finished: from vLLM's `IterationStats` of a step to tokens and cost of the requests that
            finished in it.
    """

    def __init__(self, vllm_config: Any, finished: Callable[[Any], Iterable[Finished]]) -> None:
        name = vllm_config.model_config.served_model_name
        self._finished = finished
        self._counters = {each: counter(each).labels(name) for each in COUNTERS}
        self._tpf = tpf_histogram().labels(name)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Count the requests that finished in a step."""
        for num_tokens, cost in self._finished(iteration_stats):
            self._counters["generated_tokens"].inc(num_tokens)
            self._counters["denoising_forwards"].inc(cost.num_forwards)
            self._counters["prefill_forwards"].inc(cost.num_prefill_forwards)
            self._counters["commit_forwards"].inc(cost.num_commit_forwards)
            self._tpf.observe(ratio(num_tokens, cost.num_forwards))

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


@cache  # a process has one registry, and may start several engines
def counter(name: str) -> Counter:
    """One of `COUNTERS`; Prometheus adds `_total` to its name."""
    return Counter(f"dmax:{name}", COUNTERS[name], ["model_name"])


@cache
def tpf_histogram() -> Histogram:
    """TPF of finished requests."""
    what = "Generated tokens per denoising forward, by request."
    return Histogram("dmax:tokens_per_forward", what, ["model_name"], buckets=TPF_BUCKETS)
