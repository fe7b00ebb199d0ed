"""Numbers of the published implementation: logits, masks, losses, inputs (golden/README.md).

Decoding trajectories are compared in engine/test_golden_trajectories.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from flex import flex_mask
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoModelForCausalLM
from transformers.integrations import flex_attention as flex_integration

from dmax.attention import block_causal, dense_mask, noisy_clean
from dmax.blend import SoftTokens, embed_tokens
from dmax.models import LLaDA2MoeModelLM, register
from dmax.training.clean_stream import NoisyBatch
from dmax.training.objectives import mdlm_loss, oput_loss
from dmax.training.rollout import pick

register()
GOLDEN = Path(__file__).parent / "golden"
EXPERTS = ("eager", "grouped_mm", "batched_mm")


class Golden(NamedTuple):
    path: Path
    model: LLaDA2MoeModelLM
    tensors: dict[str, Tensor]
    block_length: int
    mask_token_id: int
    trajectories: int


def load_golden(name: str) -> Golden:
    path = GOLDEN / name
    record = json.loads((path / "expected.json").read_text())
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tensors = load_file(path / "expected.safetensors")
    return Golden(
        path, model, tensors, record["block_length"], record["mask_token_id"], len(record["spd"])
    )


@pytest.fixture(scope="module", params=["llada2_moe_a", "llada2_moe_c"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


def block_causal_logits(
    golden: Golden, *, attention: str, experts: str, form: str = "dense"
) -> Tensor:
    ids = golden.tensors["block_causal.input_ids"]
    length, predicate = ids.shape[1], block_causal(golden.block_length)
    position = torch.arange(length)
    dense = dense_mask(predicate, position, position)[None, None]
    mask = flex_mask(predicate, length, length, "cpu") if form == "flex" else dense
    model: Any = AutoModelForCausalLM.from_pretrained(
        golden.path,
        dtype=torch.float32,
        attn_implementation=attention,
        experts_implementation=experts,
    )
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_match_the_published_code(golden: Golden, attention: str, experts: str) -> None:
    logits = block_causal_logits(golden, attention=attention, experts=experts)
    torch.testing.assert_close(logits, golden.tensors["block_causal.logits"], atol=2e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("form", ["dense", "flex"])
@pytest.mark.parametrize("experts", EXPERTS)
def test_flex_logits_match_the_published_code(
    golden: Golden, experts: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uncompiled: the same arithmetic without seconds of compilation. A compiled case follows."""

    def uncompiled(
        query: Tensor, key: Tensor, value: Tensor, training: bool = False, **kwargs: Any
    ) -> Any:
        return flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(flex_integration, "compile_friendly_flex_attention", uncompiled)
    logits = block_causal_logits(golden, attention="flex_attention", experts=experts, form=form)
    torch.testing.assert_close(logits, golden.tensors["block_causal.logits"], atol=2e-4, rtol=0)


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="compiling needs a C++ compiler"
)
@pytest.mark.parametrize(("name", "form"), [("llada2_moe_a", "flex"), ("llada2_moe_c", "dense")])
def test_compiled_flex_logits_match_the_published_code(name: str, form: str) -> None:
    """A dense mask once crashed the process: transformers would index it in the compiled kernel."""
    golden = load_golden(name)
    logits = block_causal_logits(golden, attention="flex_attention", experts="eager", form=form)
    torch.testing.assert_close(logits, golden.tensors["block_causal.logits"], atol=2e-4, rtol=0)


def test_training_mask_matches_the_published_code(golden: Golden) -> None:
    expected = golden.tensors["oput.train_mask"]
    position = torch.arange(len(expected))
    assert torch.equal(
        dense_mask(noisy_clean(golden.block_length, len(expected) // 2), position, position),
        expected,
    )


def golden_batch(golden: Golden) -> NoisyBatch:
    clean, noisy, labels = (
        golden.tensors[f"oput.{name}"] for name in ("clean_ids", "noisy_ids", "labels")
    )
    return NoisyBatch(clean, noisy, labels)


def test_losses_match_the_published_code(golden: Golden) -> None:
    options: dict[str, Any] = {
        "block_length": golden.block_length,
        "mask_token_id": golden.mask_token_id,
    }
    loss = oput_loss(golden.model, golden_batch(golden), **options)
    masked = golden.tensors["oput.loss_masked_per_sequence"]
    predicted = golden.tensors["oput.loss_predicted_per_sequence"]
    torch.testing.assert_close(loss.per_sequence["masked"], masked, rtol=1e-4, atol=0)
    torch.testing.assert_close(loss.per_sequence["predicted"], predicted, rtol=1e-4, atol=0)
    mdlm = mdlm_loss(golden.model, golden_batch(golden), block_length=golden.block_length)
    torch.testing.assert_close(mdlm.per_sequence["masked"], masked, rtol=1e-4, atol=0)


def test_rollout_matches_the_published_code(golden: Golden) -> None:
    batch = golden_batch(golden)
    length = batch.clean_ids.shape[1]
    position = torch.arange(2 * length)
    mask = dense_mask(noisy_clean(golden.block_length, length), position, position)[None, None]
    with torch.no_grad():
        both = torch.cat((batch.noisy_ids, batch.clean_ids), dim=1)
        logits = golden.model(
            input_ids=both, attention_mask=mask, position_ids=(position % length)[None]
        ).logits
    tokens, _ = pick(logits[:, :length], golden.mask_token_id)
    predicted = torch.where(batch.noisy_ids == golden.mask_token_id, tokens, batch.noisy_ids)
    assert torch.equal(predicted, golden.tensors["oput.predicted_ids"])


def test_labels_of_the_published_code_are_the_whole_response(golden: Golden) -> None:
    """Unmasked response positions are labelled too, prompts never are."""
    batch, prompts = golden_batch(golden), golden.tensors["oput.prompt_lengths"]
    is_prompt = torch.arange(batch.labels.shape[1]) < prompts[:, None]
    assert torch.equal(batch.labels[~is_prompt], batch.clean_ids[~is_prompt])
    assert (batch.labels[is_prompt] == -100).all()
    assert torch.equal(batch.noisy_ids[is_prompt], batch.clean_ids[is_prompt])


def test_soft_inputs_match_the_published_code(golden: Golden) -> None:
    """Replay each first block on the published inputs; our blend gives the published next ones."""
    model, embed, compared = golden.model, golden.model.get_input_embeddings(), 0
    for trajectory in range(golden.trajectories):
        prompt = golden.tensors[f"spd.{trajectory}.prompt"][0]
        start = len(prompt) // golden.block_length * golden.block_length
        tail = len(prompt) - start
        block = torch.full((golden.block_length,), golden.mask_token_id)
        block[:tail] = prompt[start:]
        position = torch.arange(start + golden.block_length)
        mask = dense_mask(block_causal(golden.block_length), position, position)[None, None]
        with torch.no_grad():
            context, inputs = embed(prompt[:start]), embed(block)
            for step in range(golden.block_length):
                published = golden.tensors.get(f"spd.{trajectory}.step{step}.input_embeds_next")
                if published is None:
                    break
                logits = model(
                    inputs_embeds=torch.cat((context, inputs))[None], attention_mask=mask
                ).logits[0, start:]
                after = golden.tensors[f"spd.{trajectory}.step{step}.block"]
                soft_where = (after != golden.mask_token_id) & (
                    torch.arange(golden.block_length) >= tail
                )
                probs = logits.softmax(-1).gather(-1, after[:, None])
                soft = SoftTokens(soft_where[None], after[None, :, None], probs[None])
                ours = embed_tokens(embed, after[None], soft, golden.mask_token_id)[0]
                torch.testing.assert_close(ours, published, atol=1e-4, rtol=0)
                inputs, compared = published, compared + 1
    assert compared >= 6
