"""The LLaDA-2.x network against independent, naive readings of its specification.

Golden numbers are in test_golden.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from dmax.attention import block_causal, dense_mask
from dmax.models import LLaDA2MoeConfig, LLaDA2MoeModelLM
from dmax.models.llada2_moe.modeling import LLaDA2MoeExperts, LLaDA2MoeRouter

BLOCK = 8


def tiny_config(**changes: Any) -> LLaDA2MoeConfig:
    fields: dict[str, Any] = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=2,
        topk_group=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LLaDA2MoeConfig(**{**fields, **changes})


@pytest.fixture(scope="module")
def model() -> LLaDA2MoeModelLM:
    torch.manual_seed(0)
    return LLaDA2MoeModelLM(tiny_config()).eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(2, 64, (2, 3 * BLOCK), generator=torch.Generator().manual_seed(1))


def causal(length: int) -> Tensor:
    position = torch.arange(length)
    return dense_mask(block_causal(BLOCK), position, position)[None, None]


# ---- inputs -------------------------------------------------------------------------------------


@torch.no_grad()
def test_embeddings_and_ids_are_the_same_input(model: LLaDA2MoeModelLM, ids: Tensor) -> None:
    from_ids = model(input_ids=ids, attention_mask=causal(ids.shape[1])).logits
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(
        model(inputs_embeds=embeds, attention_mask=causal(ids.shape[1])).logits, from_ids
    )


def test_exactly_one_input_is_required(model: LLaDA2MoeModelLM, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids=ids, inputs_embeds=model.get_input_embeddings()(ids))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bool_and_additive_masks_are_the_same(ids: Tensor, attention: str) -> None:
    torch.manual_seed(0)
    config = tiny_config()
    config._attn_implementation = attention
    model = LLaDA2MoeModelLM(config).eval()
    visible = causal(ids.shape[1])
    additive = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
    expected = model(input_ids=ids, attention_mask=visible).logits
    torch.testing.assert_close(model(input_ids=ids, attention_mask=additive).logits, expected)
    without = model(input_ids=ids).logits
    assert not torch.allclose(without, expected)
    everything = torch.ones_like(visible)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=everything).logits, without)


@torch.no_grad()
def test_padding_mask_hides_padding(model: LLaDA2MoeModelLM, ids: Tensor) -> None:
    padded = torch.cat((ids, torch.zeros(2, 5, dtype=torch.long)), dim=1)
    padding = torch.ones(padded.shape, dtype=torch.long)
    padding[:, ids.shape[1] :] = 0
    logits = model(input_ids=padded, attention_mask=padding).logits[:, : ids.shape[1]]
    torch.testing.assert_close(logits, model(input_ids=ids).logits)


def test_other_mask_ranks_are_refused(model: LLaDA2MoeModelLM, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="2 or 4 dimensions"):
        model(input_ids=ids, attention_mask=torch.ones(2, 3, 3, dtype=torch.bool))


@torch.no_grad()
def test_positions_count_from_zero_and_only_differences_matter(
    model: LLaDA2MoeModelLM, ids: Tensor
) -> None:
    position = torch.arange(ids.shape[1])[None]
    expected = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids, position_ids=position).logits, expected)
    torch.testing.assert_close(
        model(input_ids=ids, position_ids=position + 17).logits, expected, atol=1e-4, rtol=1e-4
    )
    assert not torch.allclose(
        model(input_ids=ids, position_ids=position * 3).logits, expected, atol=1e-2
    )


@torch.no_grad()
def test_logits_to_keep(model: LLaDA2MoeModelLM, ids: Tensor) -> None:
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(
        model(input_ids=ids, logits_to_keep=BLOCK).logits, expected[:, -BLOCK:]
    )
    torch.testing.assert_close(
        model(input_ids=ids, logits_to_keep=slice(2, 5)).logits, expected[:, 2:5]
    )


def test_loss_is_not_shifted(model: LLaDA2MoeModelLM, ids: Tensor) -> None:
    labels = ids.clone()
    labels[:, :BLOCK] = -100
    outputs = model(input_ids=ids, labels=labels)
    expected = F.cross_entropy(outputs.logits[:, BLOCK:].flatten(0, 1), ids[:, BLOCK:].flatten())
    torch.testing.assert_close(outputs.loss, expected)


# ---- cache and visibility -----------------------------------------------------------------------


@torch.no_grad()
def test_cached_prefix_and_block_equal_one_block_causal_forward(
    model: LLaDA2MoeModelLM, ids: Tensor
) -> None:
    expected = model(input_ids=ids, attention_mask=causal(ids.shape[1])).logits
    prefix = 2 * BLOCK
    cache = DynamicCache()
    first = model(
        input_ids=ids[:, :prefix], attention_mask=causal(prefix), past_key_values=cache
    ).logits
    assert cache.get_seq_length() == prefix
    # Positions are counted on from the cache, and a block sees all of it.
    block = model(input_ids=ids[:, prefix:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat((first, block), dim=1), expected, atol=1e-5, rtol=1e-4)


def test_no_gradient_from_invisible_positions(model: LLaDA2MoeModelLM, ids: Tensor) -> None:
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, attention_mask=causal(ids.shape[1])).logits
    (gradient,) = torch.autograd.grad(logits[:, BLOCK : 2 * BLOCK].square().sum(), embeds)
    assert (gradient[:, 2 * BLOCK :] == 0).all()
    assert (gradient[:, : 2 * BLOCK] != 0).any(dim=-1).all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(ids: Tensor, reentrant: bool) -> None:
    torch.manual_seed(0)
    model = LLaDA2MoeModelLM(tiny_config()).train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=ids, attention_mask=causal(ids.shape[1]), labels=ids).loss.backward()
        found = [parameter.grad for parameter in model.parameters()]
        return [gradient.clone() for gradient in found if gradient is not None]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    # The Trainer does so too: reentrant checkpointing needs an input with a gradient.
    model.enable_input_require_grads()
    found = gradients()
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_bfloat16_stays_close(ids: Tensor, tmp_path: Path) -> None:
    """All experts are chosen, so that rounding cannot flip the choice."""
    torch.manual_seed(0)
    model = LLaDA2MoeModelLM(tiny_config(num_experts_per_tok=8, topk_group=2)).eval()
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    logits = LLaDA2MoeModelLM.from_pretrained(tmp_path, dtype=torch.bfloat16)(input_ids=ids).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.03 * expected.norm()


# ---- router and experts -------------------------------------------------------------------------


def naive_route(
    x: Tensor, weight: Tensor, bias: Tensor, config: LLaDA2MoeConfig
) -> dict[int, float]:
    """One token's experts and weights, as prose: formats.md, 'Forward, in order'."""
    scores = [1 / (1 + torch.exp(-(row.double() @ x.double())).item()) for row in weight]
    choice = [score + shift for score, shift in zip(scores, bias.tolist(), strict=True)]
    size = config.num_experts // config.n_group
    groups = [range(first, first + size) for first in range(0, config.num_experts, size)]
    strength = []
    for group in groups:
        in_order = sorted((choice[expert] for expert in group), reverse=True)
        strength.append(sum(in_order[:2]))
    best = sorted(range(config.n_group), key=lambda group: -strength[group])[: config.topk_group]
    allowed = [expert for group in best for expert in groups[group]]
    chosen = sorted(allowed, key=lambda expert: -choice[expert])[: config.num_experts_per_tok]
    total = 1.0
    if config.norm_topk_prob and config.num_experts_per_tok > 1:
        total = sum(scores[expert] for expert in chosen) + 1e-20
    scaling = config.routed_scaling_factor
    return {expert: scores[expert] / total * scaling for expert in chosen}


@st.composite
def router_configs(draw: st.DrawFn) -> LLaDA2MoeConfig:
    n_group = draw(st.sampled_from([1, 2, 4]))
    group_size = draw(st.integers(1, 4))
    topk_group = draw(st.integers(1, n_group))
    return tiny_config(
        num_experts=n_group * group_size,
        n_group=n_group,
        topk_group=topk_group,
        num_experts_per_tok=draw(st.integers(1, topk_group * group_size)),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
    )


def random_router(config: LLaDA2MoeConfig, seed: int) -> LLaDA2MoeRouter:
    generator = torch.Generator().manual_seed(seed)
    router = LLaDA2MoeRouter(config)
    router.weight.data = torch.randn(router.weight.shape, generator=generator) * 0.3
    router.expert_bias = torch.randn(router.expert_bias.shape, generator=generator) * 0.3
    return router


@settings(deadline=None, max_examples=40)
@given(config=router_configs(), seed=st.integers(0, 2**31))
def test_router_equals_its_specification(config: LLaDA2MoeConfig, seed: int) -> None:
    router = random_router(config, seed)
    tokens = torch.randn(5, config.hidden_size, generator=torch.Generator().manual_seed(seed + 1))
    index, weights = router(tokens)
    assert weights.dtype == torch.float32
    for token, experts, shares in zip(tokens, index.tolist(), weights.tolist(), strict=True):
        expected = naive_route(token, router.weight, router.expert_bias, config)
        assert dict(zip(experts, shares, strict=True)) == pytest.approx(expected, rel=1e-4)


def test_router_computes_in_float32_on_bfloat16_tokens() -> None:
    config = tiny_config()
    router = random_router(config, 3)
    tokens = torch.randn(64, config.hidden_size).bfloat16()
    expected_index, expected_weights = router(tokens.float())
    index, weights = router(tokens)
    assert torch.equal(index, expected_index) and torch.equal(weights, expected_weights)
    with torch.autocast("cpu", torch.bfloat16):
        index, weights = router(tokens)
    assert torch.equal(index, expected_index) and torch.equal(weights, expected_weights)


@settings(deadline=None, max_examples=20)
@given(
    implementation=st.sampled_from(["eager", "grouped_mm", "batched_mm"]),
    num_experts=st.integers(1, 6),
    num_tokens=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_experts_equal_a_naive_loop(
    implementation: str, num_experts: int, num_tokens: int, seed: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    config = tiny_config(
        num_experts=num_experts, n_group=1, topk_group=1, num_experts_per_tok=top_k
    )
    config._experts_implementation = implementation
    generator = torch.Generator().manual_seed(seed)
    experts = LLaDA2MoeExperts(config)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    tokens = torch.randn(num_tokens, config.hidden_size, generator=generator)
    index = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
    weights = torch.rand(num_tokens, top_k, generator=generator)
    expected = torch.zeros_like(tokens)
    for token in range(num_tokens):
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            gate, up = (experts.gate_up_proj[expert] @ tokens[token]).chunk(2)
            expected[token] += weight * (experts.down_proj[expert] @ (F.silu(gate) * up))
    torch.testing.assert_close(experts(tokens, index, weights), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_gradients_reach_every_part_in_every_experts_implementation(
    ids: Tensor, implementation: str
) -> None:
    torch.manual_seed(0)
    config = tiny_config()
    config._experts_implementation = implementation
    model = LLaDA2MoeModelLM(config).train()
    model(input_ids=ids, labels=ids).loss.backward()
    dead = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert not dead


# ---- configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"score_function": "softmax"}, "score_function"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_experts": 7}, "num_experts"),
        ({"rotary_dim": 6}, "rotary_dim"),
        (
            {"num_experts_per_tok": 5},
            r"`num_experts_per_tok` \(5\) .* the 4 experts of the `topk_group` \(1\)",
        ),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"topk_group": 0}, "topk_group"),
    ],
)
def test_contradictory_configurations_are_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        tiny_config(**changes)


def test_optional_parts_can_be_absent(ids: Tensor) -> None:
    config = tiny_config(
        num_shared_experts=0, moe_router_enable_expert_bias=False, use_qkv_bias=True, use_bias=True
    )
    model = LLaDA2MoeModelLM(config)
    names = set(model.state_dict())
    assert not any("shared_experts" in name or "expert_bias" in name for name in names)
    assert "model.layers.0.attention.query_key_value.bias" in names
    assert model(input_ids=ids).logits.shape == (*ids.shape, config.vocab_size)


@torch.no_grad()
def test_weights_may_arrive_module_by_module(ids: Tensor) -> None:
    """In offloading and sharding a weight is there only while the module that owns it runs."""
    accelerate = pytest.importorskip("accelerate")
    model = LLaDA2MoeModelLM(tiny_config()).eval()
    expected = model(input_ids=ids).logits
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert model.model.layers[0].attention.key_layernorm.weight.is_meta
    assert torch.equal(model(input_ids=ids).logits, expected)
