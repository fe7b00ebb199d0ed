"""Quantised experts in a layer and in whole models: what they compute, keep, and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dmax.environment import weights_digest
from dmax.errors import InputError
from dmax.kernels.quant import Format, quantize
from dmax.llm import LLM
from dmax.models import LLaDA2MoeConfig, LLaDA2MoeModelLM
from dmax.models.quantization import QuantizedExperts, quantize_experts
from dmax.params import DecodingParams
from dmax.tasks.word_problems import problems

FORMATS: tuple[Format, ...] = ("int8", "fp8", "int4")


def load(**options: Any) -> Checkpoint:
    return load_checkpoint("tiny-dmax", dtype=torch.float32, device="cpu", **options)


def dequantized(weight: Tensor, form: Format) -> Tensor:
    stored = quantize(weight, form)
    return torch.stack([stored[expert] for expert in range(len(weight))])


# ---- layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_a_layer_computes_with_the_rounded_weights_under_every_implementation(form: Format) -> None:
    config = LLaDA2MoeConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        num_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    )  # fmt: skip
    ids = torch.randint(0, 32, (2, 9))
    outputs = []
    for implementation in ("eager", "grouped_mm", "batched_mm", "dense_mm", "fused_moe"):
        torch.manual_seed(3)
        config._experts_implementation = implementation
        model = LLaDA2MoeModelLM(config).eval()
        if not outputs:  # the same rounded weights in the ordinary layer
            rounded = LLaDA2MoeModelLM(config).eval()
            rounded.load_state_dict(model.state_dict())
            for name, parameter in rounded.named_parameters():
                if parameter.dim() == 3:
                    assert "experts" in name
                    parameter.data = dequantized(parameter.data, form)
            outputs.append(rounded(input_ids=ids).logits.detach())
        quantize_experts(model, form)
        outputs.append(model(input_ids=ids).logits)
    torch.testing.assert_close(outputs[1], outputs[0])
    assert all(torch.equal(output, outputs[1]) for output in outputs[2:])


def test_other_activations_go_through_the_twin() -> None:
    gate_up = torch.randn(2, 64, 64)
    down = torch.randn(2, 64, 32)
    experts = QuantizedExperts(quantize(gate_up, "int8"), quantize(down, "int8"), F.relu)
    token = torch.randn(1, 64)
    found = experts(token, torch.tensor([[1]]), torch.tensor([[0.5]]))
    gate, up = (dequantized(gate_up, "int8")[1] @ token[0]).chunk(2)
    expected = 0.5 * dequantized(down, "int8")[1] @ (F.relu(gate) * up)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


# ---- models -------------------------------------------------------------------------------------


def test_the_experts_take_less_memory_and_the_old_ones_are_gone() -> None:
    sizes = {}
    for form in (None, *FORMATS):
        model = load(quantization=form).model
        tensors = (*model.named_parameters(), *model.named_buffers())
        sizes[form] = sum(tensor.nbytes for name, tensor in tensors if ".experts." in name)
        is_quantised = any(isinstance(module, QuantizedExperts) for module in model.modules())
        assert is_quantised == (form is not None)
    numbers = sizes[None] // 4
    assert numbers == 3 * 4 * 3 * 160 * 256  # layers, experts, projections
    assert numbers <= sizes["int8"] <= 1.03 * numbers
    assert numbers <= sizes["fp8"] <= 1.03 * numbers
    assert 0.5 * numbers <= sizes["int4"] <= 0.55 * numbers


@pytest.mark.parametrize(
    ("form", "agreement", "distance"),
    [("int8", 0.985, 0.005), ("fp8", 0.97, 0.02), ("int4", 0.9, 0.08)],
)
def test_the_bundled_model_predicts_the_same_tokens(
    form: Format, agreement: float, distance: float
) -> None:
    plain = load()
    rounded = load(quantization=form)
    assert plain.tokenizer is not None
    same = []
    apart = []
    for problem in problems(12, seed=5, split="test"):
        messages = [{"role": "user", "content": problem.question}]
        prompt = plain.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        special = plain.special_ids
        masks = [special.mask_token_id] * special.block_length
        ids = torch.tensor([[*prompt, *masks]])
        with torch.no_grad():
            logits = [checkpoint.model(input_ids=ids).logits for checkpoint in (plain, rounded)]
        same.append(logits[0].argmax(-1) == logits[1].argmax(-1))
        probs = [found.softmax(-1) for found in logits]
        apart.append((probs[0] - probs[1]).abs().sum(-1) / 2)
    assert torch.cat(same, dim=1).float().mean() >= agreement
    assert torch.cat(apart, dim=1).mean() <= distance


def test_a_quantised_model_decodes() -> None:
    quantised = LLM("tiny-dmax", device="cpu", quantization="int8")
    assert any(isinstance(module, QuantizedExperts) for module in quantised.model.modules())
    plain = LLM("tiny-dmax", device="cpu")
    (problem,) = problems(1, seed=5, split="test")
    params = DecodingParams(max_new_tokens=32)
    texts = [llm.generate(problem.question, params)[0].text for llm in (quantised, plain)]
    assert texts[0] == texts[1]
    assert weights_digest(quantised.model) != weights_digest(plain.model)


def test_a_quantised_model_is_neither_trained_nor_saved(tmp_path: Path) -> None:
    checkpoint = load(quantization="int4")
    model: Any = checkpoint.model
    embeds = model.get_input_embeddings()(torch.tensor([[1, 2, 3]]))
    assert not embeds.requires_grad
    with pytest.raises(InputError, match="quantised experts cannot be trained"):
        model(inputs_embeds=embeds.requires_grad_())
    with pytest.raises(InputError, match="quantised experts cannot be saved"):
        model.save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="quantised experts cannot be saved"):
        save_checkpoint(model, checkpoint.tokenizer, tmp_path / "whole", checkpoint.special_ids)
    assert not list(tmp_path.iterdir())


def test_what_has_no_experts_is_refused() -> None:
    checkpoint = load(quantization="int8")
    with pytest.raises(InputError, match="LLaDA2MoeModelLM has no experts to quantise"):
        quantize_experts(checkpoint.model, "int8")
    with pytest.raises(InputError, match="unknown format 'int3'"):
        load(quantization="int3")
