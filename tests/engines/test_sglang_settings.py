"""What servers are started with: other checkpoints, a YAML file, a context, SGLang's other ways."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import CONTEXT, Wanted, load
from sglang_engine import EOS, answers, changed_model, differences, num_forwards, running, token_ids
from transformers import LlamaConfig, LlamaForCausalLM

UNNAMED: dict[str, Any] = {
    "mask_token_id": None,
    "block_length": None,
    "decoding_strategy": None,
}
"""What published checkpoints leave out of config.json."""


def plainly(engine: Any, wanted: list[Wanted]) -> list[dict[str, Any]]:
    """What the engine makes of requests that leave decoding to the server."""
    prompts = [list(each.prompt) for each in wanted]
    found: list[dict[str, Any]] = engine.generate(
        input_ids=prompts, sampling_params={"max_new_tokens": 96}
    )
    return found


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "decoding.yaml"
    path.write_text(text, "utf-8")
    return str(path)


def test_a_published_checkpoint_takes_its_mask_from_the_tokenizer(tmp_path: Path) -> None:
    path = changed_model(tmp_path / "published", **UNNAMED)
    options = yaml_file(tmp_path, "strategy: spd\ntop_k: 3\n")
    with running(model_path=path, dllm_algorithm="DMax", dllm_algorithm_config=options) as engine:
        assert not differences(plainly(engine, load("spd_top_3")), load("spd_top_3"))
        # Who names another strategy begins with its own options.
        assert not differences(answers(engine, load("threshold")), load("threshold"))


def test_a_published_dmax_checkpoint_is_known_by_its_name(tmp_path: Path) -> None:
    path = changed_model(tmp_path / "DMax-Math-16B", **UNNAMED)
    with running(model_path=path) as engine:
        assert not differences(plainly(engine, load("spd")), load("spd"))


def test_a_checkpoint_without_a_strategy_is_decoded_by_threshold(tmp_path: Path) -> None:
    path = changed_model(tmp_path / "published", **UNNAMED)
    with running(model_path=path, dllm_algorithm="DMax") as engine:
        assert not differences(plainly(engine, load("threshold")), load("threshold"))


def test_the_base_model_by_what_it_names() -> None:
    from dmax.tiny import bundled

    with running(model_path=str(bundled("tiny-base"))) as engine:
        assert not differences(plainly(engine, load("base_threshold")), load("base_threshold"))
        for group in ("base_joint_threshold", "base_learn2pd"):
            assert not differences(answers(engine, load(group)), load(group)), group


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("treshold: 0.5\n", "strategy `spd` has no option `treshold`"),
        ("threshold: 2\n", "`threshold` must be a number between 0 and 1, got 2"),
        ("strategy: mbd\n", "strategy `mbd` needs 2 open blocks, and SGLang has one"),
    ],
)
def test_a_wrong_file_ends_the_start_with_a_sentence(
    tmp_path: Path, text: str, message: str
) -> None:
    named = "spd" if "strategy" not in text else None
    path = changed_model(tmp_path / "model", decoding_strategy=named)
    with (
        pytest.raises(ValueError, match=f"--dllm-algorithm-config: {message}"),
        running(
            model_path=path,
            dllm_algorithm="DMax",
            dllm_algorithm_config=yaml_file(tmp_path, text),
        ),
    ):
        pass


def test_synchronous_blocks() -> None:
    # All requests of a batch wait for the slowest block, and the answers are the same.
    with running(dllm_fdfo=False) as engine:
        for group in ("spd", "mixed", "sampled"):
            assert not differences(answers(engine, load(group)), load(group)), group


def test_no_prefix_cache_and_smaller_pages() -> None:
    with running(disable_radix_cache=True, page_size=1) as engine:
        assert not differences(answers(engine, load("spd")), load("spd"))


def test_pages_that_are_no_blocks_are_made_into_blocks() -> None:
    with running(page_size=16) as engine:
        for _ in range(2):
            assert not differences(answers(engine, load("spd")), load("spd"))


def test_up_to_the_context() -> None:
    # SGLang keeps the last two positions of its context free; what it gives is as it should be.
    with running(context_length=CONTEXT, allow_auto_truncate=True) as engine:
        wanted = [each for each in load("context") if len(each.prompt) < CONTEXT - 40]
        assert len(wanted) >= 3
        for answer, right in zip(answers(engine, wanted), wanted, strict=True):
            ids = token_ids(answer)
            assert len(right.prompt) + len(ids) == CONTEXT - 2
            assert ids == right.token_ids[: len(ids)]
            assert num_forwards(answer) == right.num_forwards


def test_another_release_is_told_and_nothing_else_happens(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    from dmax.integrations import sglang

    monkeypatch.setattr(sglang, "SUPPORTED", ("0.5.99",))
    before = {target: len(hooks) for target, hooks in HookRegistry._hooks.items()}
    with caplog.at_level(logging.WARNING):
        sglang.register()
    assert "dmax was run with sglang 0.5.99, and this is 0.5.23" in caplog.text
    assert {target: len(hooks) for target, hooks in HookRegistry._hooks.items()} == before


def test_other_models_are_served_as_without_us(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=981,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config).eval()
    path = changed_model(tmp_path / "llama")  # for its tokenizer
    model.save_pretrained(path)
    prompt = torch.arange(10, 40)[None]
    right = model.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None)
    with running(model_path=path) as engine:
        told = engine.generate(
            input_ids=prompt[0].tolist(),
            sampling_params={"max_new_tokens": 24, "temperature": 0, "ignore_eos": True},
        )
    assert told["output_ids"] == right[0, prompt.shape[1] :].tolist()
    assert "dmax_num_forwards" not in told["meta_info"]
