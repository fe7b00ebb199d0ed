"""What happens in vLLM's worker besides requests that go well: runs without any, and bad logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import load
from torch import Tensor
from vllm import LLM
from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup, warmup_kernels
from vllm_engine import complete, differences, start


@pytest.fixture(scope="module")
def llm() -> LLM:
    return start()


@pytest.fixture
def worker(llm: LLM) -> Any:
    engine: Any = llm.llm_engine
    return engine.model_executor.driver_worker.worker


def test_a_gpus_warm_up_leaves_nothing_behind(
    llm: LLM, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A GPU runs these before the first request, a CPU never.
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    runner = worker.model_runner
    warmup_kernels(runner, worker.execute_model, worker.sample_tokens)
    assert run_mixed_prefill_decode_warmup(runner, worker.execute_model, worker.sample_tokens, 100)
    _, hidden_states = runner._dummy_run(runner.max_num_tokens, skip_attn=True, is_profile=True)
    runner._dummy_sampler_run(hidden_states)
    wanted = load("spd")
    assert differences(wanted, complete(llm, wanted)) == []


def test_a_request_with_broken_logits_ends_and_the_others_go_on(
    llm: LLM, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = worker.model_runner.model
    whole = model.compute_logits
    num_calls = 0

    def once_broken(hidden_states: Tensor) -> Tensor:
        nonlocal num_calls
        logits: Tensor = whole(hidden_states)
        num_calls += len(logits) > 0
        if num_calls == 4:
            logits[40, 3] = float("nan")  # the second request's
            num_calls += 1
        return logits

    monkeypatch.setattr(model, "compute_logits", once_broken)
    wanted = load("spd")
    done = complete(llm, wanted)
    broken = [index for index, each in enumerate(done) if each.finish_reason == "error"]
    assert len(broken) == 1
    kept = [index for index in range(len(wanted)) if index not in broken]
    assert differences([wanted[at] for at in kept], [done[at] for at in kept]) == []
    assert differences(wanted, complete(llm, wanted)) == []
