"""Counts of forwards in vLLM's record of a request, with a stand-in for that record."""

from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from dmax.integrations.vllm import metrics
from dmax.outputs import Cost

COST = Cost(num_forwards=12, num_prefill_forwards=1, num_commit_forwards=2)


@dataclass
class Record:
    """`RequestSpecDecodeMetrics` of vLLM 0.32."""

    num_spec_tokens: int = 4
    histogram: list[int] = field(default_factory=lambda: [11, 0, 1, 0, 2])
    num_draft_tokens: int = 56
    per_step_accepted: list[int] = field(default_factory=list)
    per_step_drafted: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"num_spec_steps": sum(self.histogram)}


def snapshot(finish_reason: str | None, num_tokens: int = 10) -> Any:
    request = SimpleNamespace(spec_decode_metrics=Record(), num_output_tokens=num_tokens)
    return metrics.snapshot(request, SimpleNamespace(finish_reason=finish_reason), COST)


def test_tokens_and_forwards_come_back_from_a_record() -> None:
    assert metrics.tokens_and_cost(snapshot("length")) == (10, COST)
    assert metrics.tokens_and_cost(snapshot(None)) == (10, COST)


def test_the_token_that_ends_a_request_is_not_counted() -> None:
    assert metrics.tokens_and_cost(snapshot("stop")) == (9, COST)


def test_steps_of_the_record_are_denoising_forwards() -> None:
    assert snapshot("stop").histogram == [9, 0, 1, 0, 2]  # two of the eleven only committed


def test_a_snapshot_stays_as_it_was() -> None:
    request = SimpleNamespace(spec_decode_metrics=Record(), num_output_tokens=10)
    before = metrics.snapshot(request, SimpleNamespace(finish_reason=None), COST)
    kept = asdict(before)  # type: ignore[call-overload]
    request.spec_decode_metrics.histogram[0] += 5
    assert asdict(before) == kept  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "record", [None, Record(), Record(per_step_accepted=[1, 2, 3, 4], per_step_drafted=[4] * 4)]
)
def test_records_of_draft_models_are_left_alone(record: Any) -> None:
    assert metrics.tokens_and_cost(record) is None
    if record is not None:
        assert metrics._with_forwards(Record.to_dict)(record) == record.to_dict()


def test_a_response_shows_forwards_beside_what_vllm_counts() -> None:
    shown = metrics._with_forwards(Record.to_dict)(snapshot("length", num_tokens=30))
    assert shown == {
        "num_spec_steps": 12,
        "num_forwards": 12,
        "num_prefill_forwards": 1,
        "num_commit_forwards": 2,
        "tokens_per_forward": 2.5,
    }


def test_finished_requests_are_kept_for_the_counters() -> None:
    update = metrics._keep_finished(lambda *_: None)
    iteration = SimpleNamespace()
    for kept in (30, 7):  # a stop text has cut the second one
        detokenizer = SimpleNamespace(num_output_tokens=lambda kept=kept: kept)
        state = SimpleNamespace(
            spec_decode_metrics=snapshot(None, num_tokens=20), detokenizer=detokenizer
        )
        update(None, state, "stop", iteration)
    assert metrics.finished(iteration) == [(20, COST), (7, COST)]


def test_nothing_is_kept_without_statistics_or_of_other_models() -> None:
    update = metrics._keep_finished(lambda *_: None)
    update(None, SimpleNamespace(spec_decode_metrics=snapshot(None)), "stop", None)
    iteration = SimpleNamespace()
    update(None, SimpleNamespace(spec_decode_metrics=None), "stop", iteration)
    assert metrics.finished(iteration) == []
