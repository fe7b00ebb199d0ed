"""Other models in a vLLM that has the plugin: nothing changes for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

from dmax.integrations.vllm import register

PROMPT = [5, 17, 40, 9]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    """An autoregressive model with random weights."""
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64}
    config = LlamaConfig(**shape, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def llm(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder: Path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        # On a CPU the runner that blocks need interprets its kernels for sampling.
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        yield LLM(
            str(folder),
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=2,
            kv_cache_memory_bytes=32 * 2**20,
        )


def complete(llm: LLM, **options: Any) -> Any:
    params = SamplingParams(max_tokens=16, detokenize=False, ignore_eos=True, **options)
    (output,) = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
    return output.outputs[0]


def test_an_autoregressive_model_is_decoded_as_ever(llm: LLM, model: LlamaForCausalLM) -> None:
    prompt = torch.tensor([PROMPT])
    wanted = model.generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=None)
    completion = complete(llm, temperature=0)
    assert list(completion.token_ids) == wanted[0, len(PROMPT) :].tolist()
    assert completion.spec_decode_metrics is None


def test_its_requests_may_ask_what_blocks_cannot_do(llm: LLM) -> None:
    completion = complete(llm, temperature=0.8, min_p=0.01, frequency_penalty=0.5, seed=1)
    assert len(completion.token_ids) == 16
    assert set(complete(llm, logit_bias={7: 100.0}, temperature=0).token_ids) == {7}
    complete(llm, extra_args={"dmax_nonsense": 1}, min_tokens=4)


def test_temperature_1_still_samples(llm: LLM) -> None:
    found = {tuple(complete(llm).token_ids) for _ in range(3)}
    assert len(found) > 1


def test_other_diffusion_models_keep_the_rule_of_vllm() -> None:
    register()
    other = SimpleNamespace(is_diffusion=True, hf_config=LlamaConfig())
    with pytest.raises(VLLMValidationError, match="not yet supported with diffusion models"):
        SamplingParams(temperature=0.0)._validate_diffusion(other)
    SamplingParams()._validate_diffusion(other)
