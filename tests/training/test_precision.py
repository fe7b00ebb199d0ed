"""Which dtype the weights of a training have, and which one its products are computed in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from products import Products
from safetensors.torch import load_file
from test_trainer import CONFIG, write_recipe
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from dmax.errors import InputError
from dmax.models import backbone
from dmax.recipe.run import run_recipe
from dmax.recipe.sections import load_recipe
from dmax.training.trainer import DMaxTrainer

pytest.importorskip("accelerate")

EXPERTS = 5  # a size that nothing but the router's products has
INNER = 56  # multiples of it are sizes of the experts' products only
MODEL = {"config": CONFIG | {"num_experts": EXPERTS}}


def run(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Train as the recipe says; the weights that are saved."""
    folder.mkdir()
    run_recipe(load_recipe(write_recipe(folder, **changes)))
    return load_file(folder / "out" / "model.safetensors")


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "dense_mm", "eager", "fused_moe"])
def test_bf16_reaches_every_product_but_the_routers(tmp_path: Path, experts: str) -> None:
    with Products() as products:
        weights = run(
            tmp_path / "run",
            model=MODEL | {"experts_implementation": experts},
            training={"bf16": True, "max_steps": 1},
        )
    wide = [product for product in products.found if torch.float32 in product.dtypes]
    assert len(products.found) > len(wide) > 0
    assert all(EXPERTS in product.sizes for product in wide)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_bf16_reaches_adapters_of_bfloat16_weights_too(tmp_path: Path) -> None:
    """The adapters themselves are float32, and peft alone would multiply in it."""
    pytest.importorskip("peft")
    run(tmp_path / "base", model=MODEL, training={"max_steps": 1})
    (tmp_path / "adapted").mkdir()
    path = write_recipe(
        tmp_path / "adapted",
        model={
            "path": str(tmp_path / "base" / "out"),
            "dtype": "bfloat16",
            "experts_implementation": "grouped_mm",
        },
        lora={"targets": ["attention", "shared_experts", "experts"], "r": 4},
        training={"bf16": True, "max_steps": 1, "router_bias_speed": 0.0},
    )
    with Products() as products:
        folder = run_recipe(load_recipe(path))
    wide = [product for product in products.found if torch.float32 in product.dtypes]
    assert len(products.found) > len(wide)
    assert all(EXPERTS in product.sizes for product in wide)
    adapters = load_file(folder / "adapter_model.safetensors")
    assert {weight.dtype for weight in adapters.values()} == {torch.float32}


@pytest.mark.parametrize("experts", ["fused_moe", "dense_mm", "batched_mm", "eager"])
def test_bf16_reaches_the_experts_of_qwen3_moe(experts: str) -> None:
    """All but `grouped_mm`, which is transformers' own there."""
    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=INNER,
        experts_implementation=experts,
    )
    model = backbone.as_block_diffusion(Qwen3MoeForCausalLM(config))
    with Products() as products:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=torch.arange(8)[None]).logits
        logits.float().square().mean().backward()
    inner = [
        product for product in products.found if any(size % INNER == 0 for size in product.sizes)
    ]
    assert inner and all(product.dtypes == {torch.bfloat16} for product in inner)
    assert {each.grad.dtype for each in model.parameters() if each.grad is not None} == {
        torch.float32
    }


def test_the_weights_have_the_dtype_that_the_recipe_says(tmp_path: Path) -> None:
    training = {"max_steps": 1}
    [wide] = {each.dtype for each in run(tmp_path / "wide", training=training).values()}
    narrow = run(
        tmp_path / "narrow", model={"config": CONFIG, "dtype": "bfloat16"}, training=training
    )
    model = {"path": str(tmp_path / "narrow" / "out")}
    kept = run(tmp_path / "kept", model=model | {"dtype": "auto"}, training=training)
    [widened] = {
        each.dtype for each in run(tmp_path / "2", model=model, training=training).values()
    }
    assert wide == widened == torch.float32
    for weights in (narrow, kept):
        dtypes = {name: weight.dtype for name, weight in weights.items()}
        biases = {name for name, dtype in dtypes.items() if dtype == torch.float32}
        assert all(name.endswith("expert_bias") for name in biases), biases
        assert set(dtypes.values()) - {torch.float32} == {torch.bfloat16}


def test_a_killed_run_in_bfloat16_resumes_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"config": CONFIG, "dtype": "bfloat16"}
    whole = run(tmp_path / "whole", model=model)
    compute_loss = DMaxTrainer.compute_loss

    def dies_in_step_five(self: DMaxTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DMaxTrainer, "compute_loss", dies_in_step_five)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken", model=model)
    run_recipe(load_recipe(tmp_path / "broken" / "recipe.yaml"))
    resumed = load_file(tmp_path / "broken" / "out" / "model.safetensors")
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"dtype": "float16"}, "must be one of float32, bfloat16, auto, got 'float16'"),
        ({"dtype": "auto"}, "a new model has no files whose dtype it could take"),
        ({"dtype": 16}, "must be str, got 16"),
    ],
)
def test_a_wrong_dtype_is_named(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    path = write_recipe(tmp_path, model={"config": CONFIG} | model)
    with pytest.raises(InputError, match=rf"recipe.yaml:\d+: .*{message}"):
        load_recipe(path)
