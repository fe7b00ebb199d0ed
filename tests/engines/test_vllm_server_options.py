"""What an operator sets for all requests of vLLM, up to where an engine would start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from reference import model_path
from vllm import SamplingParams
from vllm.config import CompilationConfig
from vllm.engine.arg_utils import EngineArgs

from dmax.errors import InputError
from dmax.integrations.vllm.config import most_tokens, server_params
from dmax.integrations.vllm.requests import (
    check_params,
    decoding_params,
    greedy_unless_chosen,
)
from dmax.params import DecodingParams


@pytest.fixture(scope="module")
def nameless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that names no strategy."""
    return copy(tmp_path_factory.mktemp("hub") / "LLaDA2.0-mini")


def copy(folder: Path) -> Path:
    shutil.copytree(model_path(), folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config["decoding_strategy"]
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def configured(model: str | Path, **options: Any) -> Any:
    sizes = {"enforce_eager": True, "max_model_len": 128, "kv_cache_memory_bytes": 2**26}
    return EngineArgs(str(model), dtype="float32", **sizes, **options).create_engine_config()


def strategy(config: Any) -> tuple[str, float | None]:
    params = server_params(config)
    return params.strategy, params.threshold


def test_the_checkpoints_strategy_comes_first() -> None:
    assert strategy(configured(model_path())) == ("spd", None)
    other = {"dmax_strategy": "threshold", "dmax_threshold": 0.9}
    assert strategy(configured(model_path(), additional_config=other)) == ("spd", None)


def test_its_threshold_is_the_operators() -> None:
    config = configured(model_path(), additional_config={"dmax_threshold": 0.3})
    assert strategy(config) == ("spd", 0.3)


def test_the_operator_may_change_what_the_checkpoint_names() -> None:
    config = configured(model_path(), hf_overrides={"decoding_strategy": "threshold"})
    assert strategy(config) == ("threshold", None)


def test_the_servers_strategy_comes_next(nameless: Path) -> None:
    credit = {"dmax_strategy": "credit", "dmax_threshold": 0.8}
    assert strategy(configured(nameless, additional_config=credit)) == ("credit", 0.8)
    assert strategy(configured(nameless, hf_overrides=credit)) == ("credit", 0.8)
    both = {"additional_config": {"dmax_threshold": 0.7}, "hf_overrides": credit}
    assert strategy(configured(nameless, **both)) == ("credit", 0.7)


def test_auto_is_what_it_is_in_dmax(nameless: Path, tmp_path: Path) -> None:
    assert strategy(configured(nameless)) == ("threshold", None)
    assert strategy(configured(copy(tmp_path / "DMax-Coder-16B"))) == ("spd", None)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dmax_strategy": "sdp"}, "did you mean `spd`"),
        ({"dmax_treshold": 0.5}, "did you mean `dmax_threshold`"),
        ({"dmax_threshold": 3}, "must be a number between 0 and 1, got 3"),
        ({"dmax_strategy": "mbd"}, "needs 2 open blocks, and vLLM has one"),
    ],
)
def test_a_wrong_option_ends_the_start(
    nameless: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        configured(nameless, additional_config=options)


def test_defaults_of_the_checkpoint_for_ordinary_sampling_do_not_count(tmp_path: Path) -> None:
    folder = copy(tmp_path / "model")
    defaults = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "eos_token_id": [976, 975]}
    (folder / "generation_config.json").write_text(json.dumps(defaults), "utf-8")
    model = configured(folder).model_config
    assert model.get_diff_sampling_param() == {"temperature": 0.0}
    assert model.try_get_generation_config()["eos_token_id"] == [976, 975]
    operators = {"temperature": 0.5}
    model = configured(folder, override_generation_config=operators).model_config
    assert model.get_diff_sampling_param() == operators


def test_a_worker_leaves_out_what_it_cannot_read() -> None:
    server = DecodingParams(strategy="spd", threshold=0.4)
    wrong = SamplingParams(temperature=0, extra_args={"dmax_strategy": "mbd"})
    assert decoding_params(wrong, server) == server
    right = SamplingParams(temperature=0.5, extra_args={"dmax_threshold": "0.7"})
    read = decoding_params(right, server, seed=-3)
    assert (read.threshold, read.temperature, read.seed) == (0.7, 0.5, 2**63 - 3)


def test_a_temperature_that_nobody_chose_is_0_offline() -> None:
    assert greedy_unless_chosen(SamplingParams(max_tokens=5)).temperature == 0
    for options in ({"seed": 1}, {"n": 2}, {"temperature": 0.7}, {"temperature": 0}):
        params = SamplingParams(**options)
        assert greedy_unless_chosen(params) is params


@pytest.mark.parametrize("count", [-1, 1025])
def test_log_probabilities_of_all_tokens_are_refused(count: int) -> None:
    server = DecodingParams(strategy="spd")
    with pytest.raises(InputError, match=f"`logprobs` must be .* between 0 and 1024, got {count}"):
        check_params(SamplingParams(logprobs=count), server)
    check_params(SamplingParams(logprobs=20, temperature=0), server)


@pytest.mark.parametrize(
    ("sizes", "max_num_seqs", "most"),
    [
        ({}, 64, 32 * (512 - 64)),
        ({}, 1, 32 * (64 - 1)),
        ({"cudagraph_capture_sizes": [1, 2, 1024]}, 64, 32 * (1024 - 64)),
        ({"max_cudagraph_capture_size": 128}, 64, 32 * 64),
    ],
)
def test_the_blocks_of_a_forward_fit_where_graphs_are_full(
    sizes: dict[str, Any], max_num_seqs: int, most: int
) -> None:
    assert most_tokens(CompilationConfig(**sizes), max_num_seqs, 32) == most
    # At the worst, every request ends in a block that is not full.
    num_rows = most // 32 + max_num_seqs
    assert num_rows <= max(largest_graph(sizes, max_num_seqs), max_num_seqs)


def largest_graph(sizes: dict[str, Any], max_num_seqs: int) -> int:
    """As `VllmConfig._set_cudagraph_sizes` settles it, where a budget of tokens is larger."""
    given = sizes.get("max_cudagraph_capture_size") or max(
        sizes.get("cudagraph_capture_sizes", [0])
    )
    return given or min(max_num_seqs * 32 * 2, 512)


def test_graphs_that_requests_may_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="at least 128 tokens for 64 requests at once, got 8"):
        most_tokens(CompilationConfig(cudagraph_capture_sizes=[1, 2, 8]), 64, 32)
