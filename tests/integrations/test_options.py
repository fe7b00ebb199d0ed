"""Options of operators and clients of other engines."""

import logging
from typing import Any

import pytest

from dmax.decoding import get_strategy, strategies
from dmax.errors import InputError, one_line
from dmax.integrations import options
from dmax.integrations.options import (
    check_request,
    check_runs_here,
    request_params,
    server_params,
)
from dmax.params import DecodingParams

SPD = DecodingParams(strategy="spd", threshold=0.4, top_k=2)


def refusal(extra: dict[str, Any], server: DecodingParams = SPD) -> str:
    with pytest.raises(InputError) as caught:
        check_request(extra, server, "vLLM")
    return one_line(caught.value)


# --- the server's strategy: the checkpoint's, else its own, else "auto" ---


@pytest.mark.parametrize(
    ("extra", "named", "auto", "strategy"),
    [
        (None, None, "threshold", "threshold"),
        ({}, None, "spd", "spd"),
        ({"dmax_strategy": "credit"}, None, "spd", "credit"),
        ({"dmax_strategy": "auto"}, None, "spd", "spd"),
        ({"dmax_strategy": "auto"}, "credit", "spd", "credit"),
        ({}, "spd", "threshold", "spd"),
        ({"dmax_strategy": "threshold"}, "spd", "threshold", "spd"),
    ],
)
def test_the_checkpoint_comes_before_the_server_and_the_server_before_auto(
    extra: dict[str, Any] | None, named: str | None, auto: str, strategy: str
) -> None:
    assert server_params(extra, named, auto).strategy == strategy


def test_options_of_the_server_hold_for_the_strategy_of_the_checkpoint() -> None:
    extra = {"dmax_threshold": 0.3, "dmax_soft_inputs": False, "other": 1}
    params = server_params(extra, "spd")
    assert params == DecodingParams(strategy="spd", threshold=0.3, options={"soft_inputs": False})


def test_options_for_another_strategy_than_the_checkpoints_are_left_out_with_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    options._tell_left_out.cache_clear()
    extra = {"dmax_strategy": "threshold", "dmax_threshold": 0.99}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert server_params(extra, "spd") == DecodingParams(strategy="spd")
    assert len(caplog.records) == 1
    assert "names the strategy `spd`" in caplog.text
    assert "`decoding_strategy`" in caplog.text


def test_the_operator_may_name_a_file() -> None:
    extra = {"dmax_strategy": "learn2pd", "dmax_head": "somewhere/learn2pd.safetensors"}
    assert dict(server_params(extra, None).options) == {"head": extra["dmax_head"]}


def test_what_the_operator_asked_for_holds_where_a_client_could_not_ask_for_it() -> None:
    server = server_params({"dmax_top_k": 100}, "spd")
    assert request_params({"dmax_threshold": 0.7}, server).top_k == 100


# --- a request over its server ---


@pytest.mark.parametrize("extra", [None, {}, {"kv_transfer_params": {}, "threshold": 2}])
def test_a_request_without_options_is_decoded_as_the_server_says(
    extra: dict[str, Any] | None,
) -> None:
    assert request_params(extra, SPD) == SPD


def test_a_request_changes_what_it_names_only() -> None:
    params = request_params({"dmax_threshold": 0.7, "dmax_soft_inputs": False}, SPD)
    assert (params.threshold, params.top_k, params.options) == (0.7, 2, (("soft_inputs", False),))
    again = request_params({"dmax_renormalize": False}, params)
    assert dict(again.options) == {"soft_inputs": False, "renormalize": False}


def test_another_strategy_begins_with_its_own_threshold_and_options() -> None:
    server = request_params({"dmax_soft_inputs": False, "dmax_max_steps_per_block": 9}, SPD)
    params = request_params({"dmax_strategy": "threshold"}, server)
    assert (params.threshold, params.options, params.max_steps_per_block) == (None, (), 9)
    get_strategy(params)


@pytest.mark.parametrize("name", ["auto", "spd"])
def test_naming_the_servers_own_strategy_changes_nothing(name: str) -> None:
    assert request_params({"dmax_strategy": name}, SPD) == SPD


@pytest.mark.parametrize(
    ("option", "given", "read"),
    [
        ("threshold", "0.9", 0.9),
        ("threshold", "none", None),
        ("threshold", 1, 1),
        ("top_k", "3", 3),
        ("max_steps_per_block", "null", None),
        ("max_steps_per_block", "8", 8),
    ],
)
def test_texts_become_the_numbers_that_they_are(option: str, given: Any, read: Any) -> None:
    value = getattr(request_params({f"dmax_{option}": given}, SPD), option)
    assert value == read
    assert type(value) is type(read)


@pytest.mark.parametrize("given", ["true", "True", "1", 1, 1.0, True])
def test_flags_are_read_in_every_form_that_http_gives_them(given: Any) -> None:
    server = request_params({"dmax_prefix_only": "false"}, SPD)
    assert dict(server.options) == {"prefix_only": False}
    assert dict(request_params({"dmax_prefix_only": given}, server).options)["prefix_only"] is True


def test_a_text_stays_a_text_where_the_option_is_one() -> None:
    params = request_params({"dmax_strategy": "learn2pd", "dmax_head": "tiny-base"}, SPD)
    assert params.options == (("head", "tiny-base"),)


def test_an_option_of_a_strategy_is_a_number_too() -> None:
    extra = {"dmax_strategy": "joint_threshold", "dmax_edit_threshold": "0.8"}
    assert dict(request_params(extra, SPD).options) == {"edit_threshold": 0.8}
    extra["dmax_edit_threshold"] = "none"
    assert dict(request_params(extra, SPD).options) == {"edit_threshold": None}


# --- refusals ---


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (
            {"dmax_treshold": 0.5},
            "strategy `spd` has no option `dmax_treshold`; did you mean `dmax_threshold`?",
        ),
        ({"dmax_softinputs": True}, "did you mean `dmax_soft_inputs`?"),
        ({"dmax_": 1}, "has no option `dmax_`"),
        ({"dmax_qqqqqq": 1}, "it has dmax_strategy, dmax_threshold, "),
        ({"dmax_strategy": "sdp"}, "did you mean `spd`?"),
        ({"dmax_strategy": 1}, "`strategy` must be a name, got 1"),
        ({"dmax_strategy": ["spd"]}, "`strategy` must be a name"),
        ({"dmax_threshold": "high"}, "`threshold` must be a number between 0 and 1, got 'high'"),
        ({"dmax_threshold": "nan"}, "`threshold` must be a number between 0 and 1"),
        ({"dmax_threshold": [0.5]}, "`threshold` must be a number between 0 and 1"),
        ({"dmax_threshold": 1.5}, "`threshold` must be a number between 0 and 1, got 1.5"),
        ({"dmax_threshold": True}, "`threshold` must be a number between 0 and 1, got True"),
        ({"dmax_top_k": 3.5}, "`top_k` must be a whole number between 1 and 1024, got 3.5"),
        ({"dmax_top_k": "9" * 5000}, "`top_k` must be a whole number between 1 and 1024"),
        ({"dmax_top_k": 0}, "`top_k` must be a whole number between 1 and 1024, got 0"),
        ({"dmax_top_k": 33}, "`dmax_top_k` must be at most 32 in a request, got 33"),
        ({"dmax_max_steps_per_block": -1}, "`max_steps_per_block` must be a whole number"),
        ({"dmax_soft_inputs": "maybe"}, "`soft_inputs` must be true or false, got 'maybe'"),
        ({"dmax_soft_inputs": 2}, "`soft_inputs` must be true or false, got 2"),
        ({"dmax_soft_inputs": [1]}, "`soft_inputs` must be a number, a text, true or false"),
        ({"dmax_temperature": 1}, "there is no option `dmax_temperature`; ask for `temperature`"),
        ({"dmax_block_length": 8}, "the block length is the checkpoint's"),
        ({"dmax_options": "{}"}, "name each option of the strategy with `dmax_` before it"),
        ({"dmax_strategy": "learn2pd"}, "needs the option `head`"),
        ({"dmax_strategy": "learn2pd", "dmax_head": 5}, "`dmax_head` must be tiny-base in"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(extra: dict[str, Any], sentence: str) -> None:
    said = refusal(extra)
    assert sentence in said.replace("option `soft_inputs`", "`soft_inputs`")
    assert "\n" not in said


def test_a_client_does_not_name_files_of_the_server() -> None:
    said = refusal({"dmax_strategy": "learn2pd", "dmax_head": "/etc/hostname"})
    assert said.startswith("`dmax_head` must be tiny-base in a request")


@pytest.mark.parametrize("option", ["deadline", "ignore_eos", "max_new_tokens", "seed", "stop"])
def test_what_an_engine_has_a_name_for_is_not_an_option_of_ours(option: str) -> None:
    assert refusal({f"dmax_{option}": 1}).startswith(f"there is no option `dmax_{option}`; ")


def test_a_setting_of_the_server_that_the_request_spoils_is_refused() -> None:
    server = DecodingParams(strategy="credit", options={"alpha": 0.7})
    assert "has no option `dmax_alpha`" in refusal(
        {"dmax_strategy": "spd", "dmax_alpha": 1}, server
    )


# --- what runs in an engine with one open block ---


def test_strategies_with_one_open_block_run_and_the_others_are_refused() -> None:
    heads = {"demask": {"head": "tiny-base"}, "learn2pd": {"head": "tiny-base"}}
    refused = {}
    for name in strategies():
        strategy = get_strategy(DecodingParams(strategy=name, options=heads.get(name, {})))
        try:
            check_runs_here(strategy, "vLLM")
        except InputError as error:
            refused[name] = error.message
    assert refused == {
        "d2f": "strategy `d2f` needs 4 open blocks, and vLLM has one",
        "demask": "strategy `demask` needs hidden states, and vLLM gives logits only",
        "lopa": "strategy `lopa` needs 2 branches of a block, and vLLM computes one",
        "mbd": "strategy `mbd` needs 2 open blocks, and vLLM has one",
    }


@pytest.mark.parametrize(("name", "option"), [("mbd", "blocks"), ("lopa", "num_branches")])
def test_the_same_strategies_run_with_one_block_or_branch(name: str, option: str) -> None:
    params = check_request({"dmax_strategy": name, f"dmax_{option}": "1"}, SPD, "vLLM")
    assert dict(params.options) == {option: 1}


def test_a_strategy_that_cannot_open_blocks_of_the_engines_length_is_refused() -> None:
    extra = {"dmax_strategy": "learn2pd", "dmax_head": "tiny-base"}
    check_request(extra, DecodingParams(block_length=32), "vLLM")
    said = refusal(extra, DecodingParams(block_length=64))
    assert "blocks of up to 32 positions, got 64" in said
