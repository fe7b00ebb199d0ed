"""What Prometheus is told."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from dmax.serve.log import Record
from dmax.serve.metrics import Metrics, router


@dataclass(frozen=True)
class Load:
    num_running: int
    num_waiting: int
    num_slots: int


def samples(metrics: Metrics) -> dict[str, float]:
    """Values by name and labels, which are sorted by their names."""

    def key(sample: Sample) -> str:
        labels = [value for _, value in sorted(sample.labels.items())]
        return f"{sample.name}{{{','.join(labels)}}}"

    families = text_string_to_metric_families(metrics.page().decode())
    return {key(sample): sample.value for family in families for sample in family.samples}


def finished(**given: object) -> Record:
    record = Record(status=200, is_complete=True, model="tiny-dmax")
    for name, value in given.items():
        setattr(record, name, value)
    return record


def test_requests_are_counted_by_outcome_and_what_they_cost() -> None:
    metrics = Metrics({})
    answered = finished(
        prompt_tokens=40,
        completion_tokens=62,
        num_forwards=7,
        num_prefill_forwards=1,
        first_block_seconds=0.2,
        block_seconds=[0.2, 0.05],
    )
    metrics.count(answered, "/v1/chat/completions", 0.3)
    metrics.count(answered, "/v1/chat/completions", 0.3)
    metrics.count(Record(status=404, is_complete=True), "", 0.001)
    found = samples(metrics)
    name = "dmax:requests_total{tiny-dmax,finished,/v1/chat/completions}"
    assert found[name] == 2
    assert found["dmax:requests_total{,invalid,}"] == 1
    assert found["dmax:prompt_tokens_total{tiny-dmax}"] == 80
    assert found["dmax:generated_tokens_total{tiny-dmax}"] == 124
    assert found["dmax:denoising_forwards_total{tiny-dmax}"] == 14
    assert found["dmax:prefill_forwards_total{tiny-dmax}"] == 2
    assert found["dmax:tokens_per_forward_sum{tiny-dmax}"] == 2 * 62 / 7
    assert found["dmax:request_seconds_count{tiny-dmax}"] == 2
    assert found["dmax:first_block_seconds_bucket{0.25,tiny-dmax}"] == 2
    assert found["dmax:first_block_seconds_bucket{0.1,tiny-dmax}"] == 0
    assert found["dmax:block_seconds_count{tiny-dmax}"] == 4
    assert found["dmax:block_seconds_sum{tiny-dmax}"] == 0.5


def test_a_cancelled_request_costs_what_is_known_of_it() -> None:
    metrics = Metrics({})
    metrics.count(Record(model="tiny-dmax", block_seconds=[0.1]), "/v1/completions", 0.1)
    found = samples(metrics)
    assert found["dmax:requests_total{tiny-dmax,cancelled,/v1/completions}"] == 1
    assert found["dmax:block_seconds_count{tiny-dmax}"] == 1
    assert "dmax:generated_tokens_total{tiny-dmax}" not in found


def test_queue_and_slots_are_read_when_they_are_asked_for() -> None:
    loads: dict[str, Load | None] = {"tiny-dmax": None}
    metrics = Metrics({"tiny-dmax": lambda: loads["tiny-dmax"]})
    assert samples(metrics)["dmax:ready{tiny-dmax}"] == 0
    assert "dmax:slots{tiny-dmax}" not in samples(metrics)
    loads["tiny-dmax"] = Load(num_running=3, num_waiting=2, num_slots=16)
    found = samples(metrics)
    assert found["dmax:ready{tiny-dmax}"] == 1
    assert found["dmax:requests_running{tiny-dmax}"] == 3
    assert found["dmax:requests_waiting{tiny-dmax}"] == 2
    assert found["dmax:slots{tiny-dmax}"] == 16


def test_servers_of_one_process_have_figures_of_their_own() -> None:
    one, other = Metrics({}), Metrics({})
    one.lost_log_lines.inc()
    assert samples(one)["dmax:lost_log_lines_total{}"] == 1
    assert samples(other)["dmax:lost_log_lines_total{}"] == 0
    assert samples(other)["process_resident_memory_bytes{}"] > 0


def test_the_page_has_a_route() -> None:
    app = FastAPI()
    metrics = Metrics({})
    app.include_router(router(metrics))
    answer = TestClient(app).get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert "dmax:refused_connections_total 0.0" in answer.text


def test_names_are_those_of_the_plugin_for_vllm() -> None:
    ours = set(re.findall(r"# TYPE (dmax:\w+)", Metrics({}).page().decode()))
    theirs = {
        "dmax:generated_tokens_total",
        "dmax:denoising_forwards_total",
        "dmax:prefill_forwards_total",
        "dmax:tokens_per_forward",
    }
    assert theirs <= ours
