"""What a client of SGLang may ask of DMax, without an SGLang."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dmax.errors import InputError
from dmax.integrations.sglang.requests import Asked, read_request, report
from dmax.outputs import Cost
from dmax.params import DecodingParams
from dmax.special_ids import SpecialIds

IDS = SpecialIds(mask_token_id=977, eos_token_ids=(976,), pad_token_id=976, block_length=32)
SERVER = DecodingParams(strategy="spd", threshold=0.4)
NEUTRAL: dict[str, Any] = {
    # As SGLang writes what a client leaves out.
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 1 << 30,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "logit_bias": None,
    "json_schema": None,
    "regex": None,
    "ebnf": None,
    "structural_tag": None,
    "beam_width": None,
    "watermark": None,
    "sampling_seed": None,
    "custom_params": None,
}
GREEDY = {"temperature": 1.0, "top_k": 1}  # as SGLang writes a temperature of 0


def a_request(rid: str = "a", prompt: tuple[int, ...] = (1, 2), **given: Any) -> Any:
    own = {name: given.pop(name) for name in list(given) if name not in NEUTRAL}
    sampling = SimpleNamespace(**(NEUTRAL | given))
    return SimpleNamespace(
        rid=rid,
        origin_input_ids=prompt,
        sampling_params=sampling,
        customized_info=None,
        **({"return_logprob": False, "custom_logit_processor": None} | own),
    )


def read(**given: Any) -> Asked:
    return read_request(a_request(**given), SERVER, IDS)


def test_a_greedy_request_is_decoded_as_the_server_says() -> None:
    assert read(**GREEDY).params == SERVER
    assert read(temperature=0.0).params.temperature == 0.0


def test_options_of_a_request_go_over_those_of_the_server() -> None:
    asked = read(**GREEDY, custom_params={"dmax_threshold": 0.7, "dmax_top_k": "3", "other": 1})
    assert asked.params.threshold == 0.7
    assert asked.params.top_k == 3
    other = read(**GREEDY, custom_params={"dmax_strategy": "threshold"})
    assert other.strategy.name == "threshold"
    assert other.params.threshold is None


def test_sampling_has_a_seed_that_differs_between_requests_and_not_between_processes() -> None:
    assert read(temperature=0.8, sampling_seed=5).params.seed == 5
    assert read(rid="a", temperature=0.8).params.seed == 1702698405120146464
    assert read(rid="b", temperature=0.8).params.seed != 1702698405120146464


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"frequency_penalty": 0.5}, "`frequency_penalty`"),
        ({"repetition_penalty": 1.1}, "`repetition_penalty`"),
        ({"min_new_tokens": 3}, "`min_new_tokens`"),
        ({"logit_bias": {"5": 1.0}}, "`logit_bias`"),
        ({"json_schema": "{}"}, "`json_schema`"),
        ({"return_logprob": True}, "`return_logprob`"),
        ({"custom_logit_processor": "code"}, "`custom_logit_processor`"),
        ({"top_p": 0.9}, "`top_p`"),
        ({"top_k": 5, "min_p": 0.1}, "`top_k` and `min_p`"),
    ],
)
def test_what_blocks_have_no_place_for_is_refused_by_its_name(
    given: dict[str, Any], named: str
) -> None:
    with pytest.raises(InputError, match="has no place for") as caught:
        read(**given)
    assert named in caught.value.message


def test_truncation_means_nothing_to_a_greedy_request() -> None:
    assert read(**GREEDY, top_p=0.9, min_p=0.1).params.temperature == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dmax_treshold": 0.5}, "has no option `dmax_treshold`"),
        ({"dmax_threshold": 2}, "`threshold` must be a number between 0 and 1"),
        ({"dmax_strategy": "none_such"}, "unknown strategy 'none_such'"),
        ({"dmax_strategy": "mbd"}, "needs 2 open blocks, and SGLang has one"),
        ({"dmax_strategy": "lopa"}, "needs 2 branches"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(**GREEDY, custom_params=options)


def test_a_seed_below_zero_is_refused() -> None:
    with pytest.raises(InputError, match="`seed` must be a whole number"):
        read(temperature=0.8, sampling_seed=-1)


def test_a_prompt_with_the_mask_is_refused() -> None:
    with pytest.raises(InputError, match="holds the mask token 977"):
        read(prompt=(1, 977, 2))


def test_the_last_entry_for_a_token_tells_the_cost_so_far() -> None:
    request = a_request()
    report(request, Cost(num_forwards=4, num_prefill_forwards=1, num_commit_forwards=1), 3)
    report(request, Cost(num_forwards=9, num_prefill_forwards=1, num_commit_forwards=2), 2)
    assert request.customized_info == {
        "dmax_num_forwards": [4, 4, 4, 9, 9],
        "dmax_num_prefill_forwards": [1, 1, 1, 1, 1],
        "dmax_num_commit_forwards": [1, 1, 1, 2, 2],
    }
