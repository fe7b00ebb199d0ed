"""What SGLang's plugin reads from checkpoints and from the YAML file, without an SGLang."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import yaml

from dmax.errors import InputError
from dmax.integrations.sglang.checkpoint import is_ours, server_decoding
from dmax.integrations.versions import complaint
from dmax.params import DecodingParams


def folder_with(path: Path, **config: object) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    return str(path)


def test_checkpoints_that_name_a_strategy_are_ours(tmp_path: Path) -> None:
    llada = {"architectures": ["LLaDA2MoeModelLM"]}
    assert is_ours(folder_with(tmp_path / "own", **llada, decoding_strategy="spd"))
    assert not is_ours(folder_with(tmp_path / "llada", **llada))
    assert not is_ours(folder_with(tmp_path / "other", architectures=["LlamaForCausalLM"]))
    assert not is_ours(folder_with(tmp_path / "none"))
    null = folder_with(tmp_path / "null", architectures=None, decoding_strategy="spd")
    assert not is_ours(null)
    (tmp_path / "null/config.json").write_text("[1, 2", "utf-8")
    assert not is_ours(null)
    assert not is_ours("someone/some-model")
    assert is_ours("Zigeng/DMax-Math-16B")
    assert is_ours(folder_with(tmp_path / "DMax-Coder-16B", **llada))


def test_the_yaml_file_names_strategy_and_every_option() -> None:
    options = yaml.safe_load("strategy: credit\nthreshold: 0.8\nalpha: 0.7\nblock_size: 32\n")
    params = server_decoding(options, None)
    assert params == DecodingParams(strategy="credit", threshold=0.8, options={"alpha": 0.7})


def test_without_a_file_the_checkpoint_decides() -> None:
    assert server_decoding({}, "spd") == DecodingParams(strategy="spd")
    assert server_decoding({}, None) == DecodingParams(strategy="threshold")
    assert server_decoding({"threshold": 0.3}, "spd").threshold == 0.3


def test_the_strategy_of_a_checkpoint_wins(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        params = server_decoding({"strategy": "fast_dllm", "threshold": 0.9}, "spd")
    assert params == DecodingParams(strategy="spd")
    assert "the checkpoint names the strategy `spd`" in caplog.text


def test_the_file_may_choose_for_a_published_model_whose_config_names_none() -> None:
    options = {"strategy": "threshold", "threshold": 0.9}
    assert server_decoding(options, None, "spd") == DecodingParams("threshold", threshold=0.9)
    assert server_decoding({}, None, "joint_threshold") == DecodingParams("joint_threshold")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"treshold": 0.5}, "strategy `spd` has no option `treshold`"),
        ({"threshold": 5}, "`threshold` must be a number between 0 and 1, got 5"),
        ({"threshold": [1]}, "`threshold` must be a number"),
        ({"strategy": "mbd"}, "strategy `mbd` needs 2 open blocks, and SGLang has one"),
        ({"strategy": "demask"}, "strategy `demask`"),
        ({"strategy": "spdd"}, "unknown strategy 'spdd'"),
        ({1: 2}, "has no option `1`"),
    ],
)
def test_a_wrong_file_is_one_sentence(options: dict[object, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        server_decoding(options, "spd" if "strategy" not in options else None)
    assert caught.value.message.startswith("--dllm-algorithm-config: ")
    assert message in caught.value.message


def test_a_release_that_was_not_tried_is_named() -> None:
    import torch

    assert complaint("torch", (torch.__version__,)) is None
    problem = complaint("torch", ("0.1", "0.2"))
    assert problem == f"dmax was run with torch 0.1 and 0.2, and this is {torch.__version__}"
