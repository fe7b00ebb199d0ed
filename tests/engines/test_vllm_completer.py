"""vLLM behind evaluation and distillation, against a model in the same process."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
from reference import load

from dmax.completers import LocalCompleter
from dmax.distill.engine import CompleterAnswerer
from dmax.distill.files import ResponseFiles
from dmax.distill.run import distill
from dmax.errors import InputError
from dmax.evaluation.run import evaluate
from dmax.integrations.vllm.completer import VllmCompleter
from dmax.llm import LLM
from dmax.params import DecodingParams
from dmax.tasks import get_task

PARAMS = DecodingParams(max_new_tokens=96)
SMALL = {"enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": 64 * 2**20}


@pytest.fixture(scope="module")
def vllm() -> VllmCompleter:
    return VllmCompleter("tiny-dmax", dtype="float32", max_batch_size=4, **SMALL)


@pytest.fixture(scope="module")
def local() -> LocalCompleter:
    return LocalCompleter(LLM("tiny-dmax", dtype="float32", device="cpu", max_batch_size=4))


def test_an_evaluation_gives_the_same_figures(vllm: VllmCompleter, local: LocalCompleter) -> None:
    task = get_task("word_problems")
    theirs, their_samples = evaluate(vllm, task, PARAMS, limit=16, seed=0)
    ours, our_samples = evaluate(local, task, PARAMS, limit=16, seed=0)
    assert [each.output for each in their_samples] == [each.output for each in our_samples]
    for name in ("accuracy", "tpf", "generated_tokens", "decoding", "block_length", "params"):
        assert getattr(theirs, name) == getattr(ours, name), name
    assert theirs.cost.num_forwards == ours.cost.num_forwards
    assert theirs.environment["engine"].startswith("vLLM 0.32")


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "threshold", "threshold": 0.8},
        {"temperature": 1.5, "seed": 3},
        {"stop": ("apples", ". Then")},
        {"ignore_eos": True, "max_new_tokens": 20},
        {"max_steps_per_block": 2},
        {"options": {"soft_inputs": False}, "strategy": "spd"},
    ],
)
def test_completions_are_those_of_dmax(
    vllm: VllmCompleter, local: LocalCompleter, changes: dict[str, object]
) -> None:
    params = vllm.resolve(DecodingParams(**({"max_new_tokens": 96} | changes)))
    prompts = [list(each.prompt) for each in load("spd")]
    groups = vllm.completions(prompts, params, lambda done, total: None)
    theirs = dict(chain.from_iterable(groups))
    for number, ours in enumerate(local.llm.generate(prompts, params)):
        assert theirs[number].token_ids == ours.token_ids
        assert theirs[number].text == ours.text
        assert theirs[number].finish_reason == ours.finish_reason
        assert theirs[number].num_forwards == ours.num_forwards


def test_distilled_responses_are_the_same(
    vllm: VllmCompleter, local: LocalCompleter, tmp_path: Path
) -> None:
    questions = [example.prompt for example in get_task("word_problems").examples(8, 1)]
    questions.append("apples " * 600)  # longer than the context

    def responses(name: str, answerer: CompleterAnswerer) -> list[str]:
        files = ResponseFiles(tmp_path / f"{name}.jsonl")
        report = distill(answerer, questions, files)
        assert report.dropped["refused"] == 1
        return sorted((tmp_path / f"{name}.jsonl").read_text("utf-8").splitlines())

    theirs = responses("vllm", CompleterAnswerer(vllm, PARAMS, vllm.encode))
    ours = responses("local", CompleterAnswerer(local, PARAMS, vllm.encode))
    assert theirs == ours


def test_a_closed_run_leaves_nothing_behind(vllm: VllmCompleter) -> None:
    prompts = [list(each.prompt) for each in load("spd")]
    groups = vllm.completions(prompts, vllm.resolve(PARAMS), lambda done, total: None)
    assert next(groups)
    groups.close()
    assert not vllm._engine.has_unfinished_requests()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"strategy": "mbd"}, "needs 2 open blocks, and vLLM has one"),
        ({"block_length": 16, "strategy": "spd"}, "blocks of 32"),
        ({"deadline": 3.0, "strategy": "spd"}, "deadline"),
        ({"strategy": "spd", "top_k": 100}, "at most 32"),
    ],
)
def test_what_vllm_cannot_do_is_refused(
    vllm: VllmCompleter, changes: dict[str, object], sentence: str
) -> None:
    params = DecodingParams(**changes)
    with pytest.raises(InputError, match=sentence):
        list(vllm.completions([[5, 6]], params, lambda done, total: None))
    assert not vllm._engine.has_unfinished_requests()


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(**shape, num_attention_heads=2, mask_token_id=5, block_length=8)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has the architecture"):
        VllmCompleter(str(tmp_path))
