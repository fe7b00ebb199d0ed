"""Quantised experts: the formats on numbers worked out by hand, the kernels against their twin, and whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, weights_digest
from dmax.errors import InputError
from dmax.kernels.moe import fused_moe, routed
from dmax.kernels.quant import Format, QuantizedExperts, quantize, quantize_experts
from dmax.llm import LLM
from dmax.models import LLaDA2MoeConfig, LLaDA2MoeModelLM
from dmax.params import DecodingParams
from dmax.tasks.word_problems import problems

FORMATS: tuple[Format, ...] = ("int8", "fp8", "int4")
EXPERTS, TOP_K = 8, 2


def load(**options: Any) -> Checkpoint:
    return load_checkpoint("tiny-dmax", dtype=torch.float32, device="cpu", **options)


def dequantized(weight: Tensor, form: Format) -> Tensor:
    stored = quantize(weight, form)
    return torch.stack([stored[expert] for expert in range(len(weight))])


# ---- formats --------------------------------------------------------------------------------------------------------


def test_int8_by_hand() -> None:
    # The largest becomes -128: scales 0.02 and, with turned signs, -0.02.
    stored = quantize(torch.tensor([[[-2.56, 1.27, 0.0, 0.031], [2.56, -2.54, 0.5, 0.0]]]), "int8")
    assert stored.values.tolist() == [
        [[-128, 64, 0, 2], [-128, 127, -25, 0]]
    ]  # 63.5 to the even 64
    torch.testing.assert_close(stored.scale, torch.tensor([[[0.02], [-0.02]]]))
    torch.testing.assert_close(
        stored[0], torch.tensor([[-2.56, 1.28, 0.0, 0.04], [2.56, -2.54, 0.5, 0.0]])
    )
    assert stored.shape == (1, 2, 4)


def test_fp8_by_hand() -> None:
    # The scale is 1; e4m3 has four binary digits, so 17 lies between 16 and 18, and a tie goes to
    # the even digit.
    stored = quantize(torch.tensor([[[-448.0, 17.0, 19.0, 0.0]]]), "fp8")
    assert stored.values.dtype == torch.float8_e4m3fn
    assert stored[0].tolist() == [[-448.0, 16.0, 20.0, 0.0]]


def test_int4_by_hand() -> None:
    row = torch.zeros(32)
    row[0], row[1], row[16], row[17] = (
        -4.0,
        3.0,
        1.0,
        2.5,
    )  # -4 becomes -8, so the scale is 0.5 and these -8, 6, 2, 5
    stored = quantize(row.repeat(1, 1, 3), "int4")  # 96 columns make three groups of 32
    assert stored.scale.tolist() == [[[0.5, 0.5, 0.5]]]
    # Low halves hold columns 0 to 15 of a group, high halves 16 to 31, each with 8 added.
    assert stored.values[0, 0, :3].tolist() == [0 | 10 << 4, 14 | 13 << 4, 8 | 8 << 4]
    assert stored.shape == (1, 1, 96)
    assert torch.equal(stored[0], row.repeat(1, 3))


@pytest.mark.parametrize(("columns", "group"), [(512, 128), (64, 64), (160, 32)])
def test_int4_takes_the_largest_group_that_divides(columns: int, group: int) -> None:
    stored = quantize(torch.randn(2, 3, columns), "int4")
    assert stored.group_size == group
    assert stored.values.shape == (2, 3, columns // 2) and stored.scale.shape == (
        2,
        3,
        columns // group,
    )


@pytest.mark.parametrize(("form", "bound"), [("int8", 0.01), ("fp8", 0.03), ("int4", 0.11)])
def test_rounding_errors_are_those_of_the_format(form: Format, bound: float) -> None:
    weight = torch.randn(2, 64, 256)
    error = (dequantized(weight, form) - weight).norm() / weight.norm()
    assert bound / 3 <= error <= bound


@pytest.mark.parametrize("form", FORMATS)
def test_zero_and_tiny_rows_stay_finite(form: Format) -> None:
    weight = torch.zeros(1, 3, 64)
    weight[0, 1, 0], weight[0, 2, 5] = 1e-40, 3e38
    back = dequantized(weight, form)
    assert back[0, 0].eq(0).all() and back[0, 1].abs().max() <= 1.1e-40
    torch.testing.assert_close(back[0, 2], weight[0, 2], rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("weight", "form", "message"),
    [
        (torch.ones(1, 2, 48), "int4", "input channels that 32 divides, got 48"),
        (torch.tensor([[[1.0, float("nan")]]]), "int8", "not finite"),
        (torch.ones(1, 2, 64), "int5", "unknown format 'int5'; choose from int8, fp8, int4"),
    ],
)
def test_what_cannot_be_quantised(weight: Tensor, form: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize(weight, form)


# ---- forwards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("num_tokens", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_equal_their_twin(
    triton_device: torch.device, dtype: torch.dtype, num_tokens: int, form: Format
) -> None:
    if dtype == torch.bfloat16 and triton_device.type == "cpu":
        pytest.skip("Triton's interpreter has no bfloat16 products")
    if (
        triton_device.type == "cuda"
        and form == "fp8"
        and torch.cuda.get_device_capability() < (8, 9)
    ):
        pytest.skip("this GPU has no e4m3")
    index = torch.rand(num_tokens, EXPERTS).topk(TOP_K).indices.to(triton_device)
    tokens, weights = (
        torch.randn(num_tokens, size, device=triton_device, dtype=dtype) for size in (64, TOP_K)
    )
    gate_up, down = (
        quantize((torch.randn(EXPERTS, 64, size) * 0.2).to(triton_device), form)
        for size in (64, 32)
    )
    actual = fused_moe(tokens, index, weights, gate_up, down)
    exact = routed(tokens.double(), index, weights.double(), gate_up, down, F.silu)
    error = ((actual.double() - exact).norm() / exact.norm()).item()
    assert error <= {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]


@pytest.mark.parametrize("form", FORMATS)
def test_a_layer_computes_with_the_rounded_weights_under_every_implementation(form: Format) -> None:
    config = LLaDA2MoeConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1,
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


# ---- models ---------------------------------------------------------------------------------------------------------


def test_the_experts_take_less_memory_and_the_old_ones_are_gone() -> None:
    sizes = {}
    for form in (None, *FORMATS):
        model = load(quantization=form).model
        sizes[form] = sum(
            tensor.numel() * tensor.itemsize
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if ".experts." in name
        )
        assert any(isinstance(module, QuantizedExperts) for module in model.modules()) == (
            form is not None
        )
    numbers = sizes[None] // 4
    assert numbers == 3 * 4 * 3 * 160 * 256  # layers, experts, projections
    assert (
        numbers <= min(sizes["int8"], sizes["fp8"])
        and max(sizes["int8"], sizes["fp8"]) <= 1.03 * numbers
    )
    assert 0.5 * numbers <= sizes["int4"] <= 0.55 * numbers


@pytest.mark.parametrize(
    ("form", "agreement", "distance"),
    [("int8", 0.985, 0.005), ("fp8", 0.97, 0.02), ("int4", 0.9, 0.08)],
)
def test_the_bundled_model_predicts_the_same_tokens(
    form: Format, agreement: float, distance: float
) -> None:
    plain, rounded = load(), load(quantization=form)
    assert plain.tokenizer is not None
    same, apart = [], []
    for problem in problems(12, seed=5, split="test"):
        ids = plain.tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}],
            add_generation_prompt=True,
            return_dict=False,
        )
        ids = torch.tensor([[*ids, *[plain.mask_token_id] * plain.block_length]])
        with torch.no_grad():
            logits = [checkpoint.model(input_ids=ids).logits for checkpoint in (plain, rounded)]
        same.append(logits[0].argmax(-1) == logits[1].argmax(-1))
        probs = [found.softmax(-1) for found in logits]
        apart.append((probs[0] - probs[1]).abs().sum(-1) / 2)
    assert torch.cat(same, dim=1).float().mean() >= agreement
    assert torch.cat(apart, dim=1).mean() <= distance


def test_a_quantised_model_decodes() -> None:
    llm = LLM("tiny-dmax", device="cpu", quantization="int8")
    assert any(isinstance(module, QuantizedExperts) for module in llm.model.modules())
    (problem,) = problems(1, seed=5, split="test")
    plain = LLM("tiny-dmax", device="cpu")
    params = DecodingParams(max_new_tokens=32)
    assert (
        llm.generate(problem.question, params)[0].text
        == plain.generate(problem.question, params)[0].text
    )
    assert weights_digest(llm.model) != weights_digest(plain.model)


def test_a_quantised_model_is_neither_trained_nor_saved(tmp_path: Path) -> None:
    checkpoint = load(quantization="int4")
    model: Any = checkpoint.model
    embeds = model.get_input_embeddings()(torch.tensor([[1, 2, 3]]))
    assert not embeds.requires_grad
    with pytest.raises(InputError, match="quantised experts cannot be trained"):
        model(inputs_embeds=embeds.requires_grad_())
    with pytest.raises(InputError, match="quantised experts cannot be saved"):
        model.save_pretrained(tmp_path / "plain")
    ids = {"mask_token_id": checkpoint.mask_token_id, "eos_token_id": 0, "block_length": 32}
    with pytest.raises(InputError, match="quantised experts cannot be saved"):
        save_checkpoint(model, checkpoint.tokenizer, tmp_path / "whole", **ids)
    assert not list(tmp_path.iterdir())


def test_what_has_no_experts_is_refused() -> None:
    checkpoint = load(quantization="int8")
    with pytest.raises(InputError, match="LLaDA2MoeModelLM has no experts to quantise"):
        quantize_experts(checkpoint.model, "int8")
    with pytest.raises(InputError, match="unknown format 'int3'"):
        load(quantization="int3")


def test_other_activations_go_through_the_twin() -> None:
    gate_up, down = torch.randn(2, 64, 64), torch.randn(2, 64, 32)
    experts = QuantizedExperts(quantize(gate_up, "int8"), quantize(down, "int8"), F.relu)
    token, index, weights = torch.randn(1, 64), torch.tensor([[1]]), torch.tensor([[0.5]])
    gate, up = (dequantized(gate_up, "int8")[1] @ token[0]).chunk(2)
    expected = 0.5 * dequantized(down, "int8")[1] @ (F.relu(gate) * up)
    torch.testing.assert_close(experts(token, index, weights)[0], expected, rtol=1e-4, atol=1e-4)
