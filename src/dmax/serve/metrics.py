"""What a server tells Prometheus, under the names that dmax has inside vLLM, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from dmax.outputs import ratio
from dmax.serve.log import Record
from dmax.serve.served import Load

TPF_BUCKETS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


def router(metrics: Metrics) -> APIRouter:
    """The route `/metrics`."""
    routes = APIRouter()

    @routes.get("/metrics", response_class=PlainTextResponse)
    def show() -> Response:
        """The server's figures, for Prometheus."""
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)

    return routes


class Metrics:
    """The figures of one server, in a registry of its own.

    Args:
        loads: how busy a model is now, by the name it is served under; None while it is loaded.
            Called when Prometheus asks.
    """

    def __init__(self, loads: Mapping[str, Callable[[], Load | None]]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Loads(loads))
        ProcessCollector(registry=self.registry)
        self._requests = self._counter(
            "requests", "Requests that have ended, by outcome.", "route", "outcome"
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self._generated_tokens = self._counter(
            "generated_tokens",
            "Generated tokens of finished requests, without the token that ended them.",
        )
        self._forwards = self._counter(
            "denoising_forwards", "Denoising forwards of finished requests."
        )
        self._prefill_forwards = self._counter(
            "prefill_forwards", "Forwards that read prompts of finished requests."
        )
        self._tpf = self._histogram(
            "tokens_per_forward",
            "Generated tokens per denoising forward, by request.",
            TPF_BUCKETS,
        )
        self._seconds = self._histogram(
            "request_seconds", "From the headers of a request to the end of its response."
        )
        self._first_block = self._histogram(
            "first_block_seconds", "From the headers of a request to its first finished block."
        )
        self._blocks = self._histogram(
            "block_seconds", "From one finished block of a request to the next."
        )
        self.lost_log_lines = Counter(
            "dmax:lost_log_lines",
            "Lines that could not be written to the log.",
            registry=self.registry,
        )
        self.refused_connections = Counter(
            "dmax:refused_connections",
            "Connections beyond the limit, which were told so and closed.",
            registry=self.registry,
        )

    def count(self, record: Record, route: str, seconds: float) -> None:
        """Count a request that has ended.

        Args:
            record: what is known of it.
            route: the pattern of its path, such as `/v1/models/{name}`; "" for an unknown path.
            seconds: from its headers to the end of its response.
        """
        model = record.model or ""
        self._requests.labels(model, route, record.ended()).inc()
        self._seconds.labels(model).observe(seconds)
        if record.prompt_tokens is not None:
            self._prompt_tokens.labels(model).inc(record.prompt_tokens)
        if record.num_forwards is not None:
            tokens = record.completion_tokens or 0
            self._generated_tokens.labels(model).inc(tokens)
            self._forwards.labels(model).inc(record.num_forwards)
            self._prefill_forwards.labels(model).inc(record.num_prefill_forwards or 0)
            self._tpf.labels(model).observe(ratio(tokens, record.num_forwards))
        if record.first_block_seconds is not None:
            self._first_block.labels(model).observe(record.first_block_seconds)
        for each in record.block_seconds:
            self._blocks.labels(model).observe(each)

    def page(self) -> bytes:
        """All figures in Prometheus's text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"dmax:{name}", what, ["model_name", *labels], registry=self.registry)

    def _histogram(
        self, name: str, what: str, buckets: tuple[float, ...] = SECONDS_BUCKETS
    ) -> Histogram:
        return Histogram(
            f"dmax:{name}", what, ["model_name"], buckets=buckets, registry=self.registry
        )


class _Loads(Collector):
    """Gauges that are read when Prometheus asks for them."""

    def __init__(self, loads: Mapping[str, Callable[[], Load | None]]) -> None:
        self._loads = loads

    def collect(self) -> Iterator[GaugeMetricFamily]:
        running = _gauge("requests_running", "Requests that have a slot.")
        waiting = _gauge("requests_waiting", "Requests in the queue for a slot.")
        slots = _gauge("slots", "Requests that are decoded at once, at most.")
        ready = _gauge("ready", "1 once the model answers requests, 0 while it is loaded.")
        for name, load_of in self._loads.items():
            load = load_of()
            ready.add_metric([name], load is not None)
            if load is not None:
                running.add_metric([name], load.num_running)
                waiting.add_metric([name], load.num_waiting)
                slots.add_metric([name], load.num_slots)
        yield from (running, waiting, slots, ready)


def _gauge(name: str, what: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"dmax:{name}", what, labels=["model_name"])
