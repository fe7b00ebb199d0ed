"""What a request gives, and what that cost."""

from __future__ import annotations

import json
from dataclasses import replace

from dmax.outputs import Cost, GenerationOutput, as_record

OUTPUT = GenerationOutput(
    text="a",
    token_ids=tuple(range(12)),
    prompt_token_ids=(1,) * 9,
    finish_reason="stop",
    cost=Cost(num_forwards=4, num_prefill_forwards=2, num_commit_forwards=3, num_positions=48),
)


def test_tokens_per_forward_count_what_was_generated() -> None:
    assert OUTPUT.tokens_per_forward == 3.0
    assert OUTPUT.tokens_per_forward_paper == 2.4  # a prefill in two parts is one
    assert OUTPUT.tokens_per_position == 0.25
    assert replace(OUTPUT, token_ids=()).tokens_per_forward == 0.0


def test_what_cost_nothing_has_rates_of_zero() -> None:
    nothing = replace(OUTPUT, token_ids=(), cost=Cost())
    assert nothing.tokens_per_forward == 0.0
    assert nothing.tokens_per_forward_paper == 0.0
    assert nothing.tokens_per_position == 0.0


def test_costs_add_up() -> None:
    one = Cost(1, 2, 3, 4, 5, 6)
    assert one + Cost() == one
    assert sum([one, one], Cost()) == Cost(2, 4, 6, 8, 10, 12)


def test_a_record_has_what_a_result_cost_beside_its_other_fields() -> None:
    record = json.loads(json.dumps(as_record(OUTPUT)))
    assert record == {
        "text": "a",
        "token_ids": list(range(12)),
        "prompt_token_ids": [1] * 9,
        "finish_reason": "stop",
        "num_forwards": 4,
        "num_prefill_forwards": 2,
        "num_commit_forwards": 3,
        "num_positions": 48,
        "num_forced": 0,
        "num_capped": 0,
    }
