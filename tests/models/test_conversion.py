"""Checkpoint files: published names and shapes, both layouts, configurations, and damaged files."""

from __future__ import annotations

import json
import shutil
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Size, Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dmax.errors import InputError
from dmax.models import LLaDA2MoeConfig, LLaDA2MoeModelLM, register
from dmax.models.llada2_moe.conversion import merged_layout, per_expert

register()
GOLDEN = Path(__file__).parents[1] / "golden" / "llada2_moe_a"

MINI: dict[str, Any] = {}  # the defaults
FLASH: dict[str, Any] = dict(
    num_hidden_layers=32,
    hidden_size=4096,
    intermediate_size=9216,
    moe_intermediate_size=1024,
    num_attention_heads=32,
)


def published_layout(model: PreTrainedModel) -> dict[str, Size]:
    """Names and shapes of per-expert files, as on the hub and as `save_pretrained` writes them."""
    layout: dict[str, Size] = {}
    for name, shape in merged_layout(model).items():
        layout |= per_expert(name, shape)
    return layout


def table(
    layers: int, hidden: int, dense: int, inner: int, qkv: int, experts: int = 256
) -> dict[str, list[int]]:
    """Names and shapes as in the published files; written without looking at the code."""
    rows = {"model.word_embeddings.weight": [157184, hidden], "model.norm.weight": [hidden]}
    rows["lm_head.weight"] = [157184, hidden]
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        rows[stem + "attention.query_key_value.weight"] = [qkv, hidden]
        rows[stem + "attention.query_layernorm.weight"] = [128]
        rows[stem + "attention.key_layernorm.weight"] = [128]
        rows[stem + "attention.dense.weight"] = [hidden, hidden]
        rows[stem + "input_layernorm.weight"] = [hidden]
        rows[stem + "post_attention_layernorm.weight"] = [hidden]
        parts = [("mlp.", dense)]
        if layer:
            rows[stem + "mlp.gate.weight"] = [experts, hidden]
            rows[stem + "mlp.gate.expert_bias"] = [experts]
            parts = [(f"mlp.experts.{expert}.", inner) for expert in range(experts)] + [
                ("mlp.shared_experts.", inner)
            ]
        for part, width in parts:
            rows[stem + part + "gate_proj.weight"] = [width, hidden]
            rows[stem + part + "up_proj.weight"] = [width, hidden]
            rows[stem + part + "down_proj.weight"] = [hidden, width]
    return rows


@pytest.mark.parametrize(
    ("changes", "rows", "count", "elements"),
    [
        pytest.param(MINI, table(20, 2048, 5120, 512, 3072), 14_813, 16_255_643_392, id="mini"),
        pytest.param(FLASH, table(32, 4096, 9216, 1024, 5120), 24_161, 102_889_705_216, id="flash"),
    ],
)
def test_names_and_shapes_are_the_published_ones(
    changes: dict[str, Any], rows: dict[str, list[int]], count: int, elements: int
) -> None:
    with torch.device("meta"):
        model = LLaDA2MoeModelLM(LLaDA2MoeConfig(**changes))
    layout = {name: list(shape) for name, shape in published_layout(model).items()}
    assert layout == rows
    assert len(layout) == count
    assert sum(prod(shape) for shape in layout.values()) == elements


# ---- loading and saving -------------------------------------------------------------------------


def load(folder: Path, **options: Any) -> LLaDA2MoeModelLM:
    model = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})
    assert type(model) is LLaDA2MoeModelLM
    return model


def stored(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in folder.glob("model*.safetensors")
        for name, tensor in load_file(file).items()
    }


def assert_same_weights(one: LLaDA2MoeModelLM, other: LLaDA2MoeModelLM) -> None:
    first = one.state_dict()
    second = other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A writable copy of a published per-expert checkpoint."""
    folder = tmp_path / "published"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / name, folder / name)
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    load(GOLDEN).save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def merged(published: Path, tmp_path: Path) -> Path:
    """The same weights as a merged training checkpoint, stacked by hand."""
    folder = tmp_path / "merged"
    folder.mkdir()
    tensors = stored(published)
    config = json.loads((published / "config.json").read_text())
    for layer in range(config["first_k_dense_replace"], config["num_hidden_layers"]):
        stem = f"model.layers.{layer}.mlp.experts."
        for part in ("gate_proj", "up_proj", "down_proj"):
            rows = [
                tensors.pop(f"{stem}{expert}.{part}.weight")
                for expert in range(config["num_experts"])
            ]
            tensors[stem + part] = torch.stack(rows)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llada2_moe_veomni"}))
    return folder


def test_saving_and_loading_is_bit_exact(tmp_path: Path) -> None:
    model = load(GOLDEN)
    model.save_pretrained(tmp_path)
    before = stored(GOLDEN)
    after = stored(tmp_path)
    assert after.keys() == before.keys() == published_layout(model).keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert_same_weights(load(tmp_path), model)


def test_a_fresh_model_is_saved_in_the_published_layout(tmp_path: Path) -> None:
    model = LLaDA2MoeModelLM(AutoConfig.from_pretrained(GOLDEN))
    model.save_pretrained(tmp_path)
    assert {name: tensor.shape for name, tensor in stored(tmp_path).items()} == published_layout(
        model
    )
    assert_same_weights(load(tmp_path), model)


def test_shards_load_to_the_same_weights(sharded: Path) -> None:
    assert_same_weights(load(sharded), load(GOLDEN))


def test_merged_files_load_to_the_same_weights_and_are_saved_per_expert(
    merged: Path, tmp_path: Path
) -> None:
    model = load(merged)
    assert_same_weights(model, load(GOLDEN))
    model.save_pretrained(tmp_path / "saved")
    assert stored(tmp_path / "saved").keys() == stored(GOLDEN).keys()
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model_type"] == "llada2_moe"
    assert_same_weights(load(tmp_path / "saved"), model)


def test_half_merged_files_load_too(published: Path, merged: Path) -> None:
    """Gate and up stacked, down per expert: what transformers saves if it may choose."""
    mixed = {}
    for name, tensor in stored(merged).items():
        if name.endswith(("experts.gate_proj", "experts.up_proj")):
            mixed[name] = tensor
    for name, tensor in stored(published).items():
        if ".experts." not in name or ".down_proj." in name:
            mixed[name] = tensor
    save_file(mixed, published / "model.safetensors", {"format": "pt"})
    assert_same_weights(load(published), load(GOLDEN))


def test_bfloat16_keeps_router_bias_and_rotary_frequencies_in_float32(
    published: Path, tmp_path: Path
) -> None:
    tensors = stored(published)
    bias = next(name for name in tensors if name.endswith("expert_bias"))
    # The differences are such that bfloat16 would drop them.
    tensors[bias] = torch.rand_like(tensors[bias]) * 1e-3 + 1.0
    save_file(tensors, published / "model.safetensors", {"format": "pt"})
    model = load(published, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.state_dict()[bias].dtype == torch.float32
    assert torch.equal(model.state_dict()[bias], tensors[bias])
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(stored(tmp_path / "saved")[bias], tensors[bias])


# ---- configuration ------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_published_configuration_loads_without_remote_code(published: Path) -> None:
    """`auto_map` names files that do not exist: touching them would fail."""
    auto_map = {
        "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
    }
    edit_config(published, auto_map=auto_map, rope_scaling=None, rope_theta=10_000.0)
    config = AutoConfig.from_pretrained(published)
    assert type(config) is LLaDA2MoeConfig
    assert config.rope_parameters is not None and config.rope_parameters["rope_theta"] == 10_000.0
    frequencies = load(published).model.rotary_emb.inv_freq
    expected = 10_000.0 ** -(torch.arange(0, config.rotary_dim, 2) / config.rotary_dim)
    torch.testing.assert_close(frequencies, expected)


def test_saved_configuration_keeps_what_other_engines_read(published: Path, tmp_path: Path) -> None:
    before = json.loads((published / "config.json").read_text())
    load(published).save_pretrained(tmp_path / "saved")
    after = json.loads((tmp_path / "saved" / "config.json").read_text())
    # These say nothing about the network, or are renamed by every transformers release.
    ignored = {"transformers_version", "torch_dtype", "rope_scaling"}
    assert {
        name: value for name, value in after.items() if name in before and name not in ignored
    } == {name: value for name, value in before.items() if name not in ignored}
    assert {
        "rope_theta",
        "partial_rotary_factor",
        "rotary_dim",
        "head_dim",
        "architectures",
    } <= after.keys()
    again = AutoConfig.from_pretrained(tmp_path / "saved")
    assert again.rope_parameters["rope_theta"] == before["rope_theta"]


# ---- damaged files ------------------------------------------------------------------------------


def rewrite(folder: Path, change: Any) -> None:
    tensors = stored(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


NAME = "model.layers.1.mlp.experts.3.up_proj.weight"


def test_missing_tensors_are_named(published: Path) -> None:
    rewrite(published, lambda tensors: tensors.pop(NAME))
    with pytest.raises(
        InputError, match=r"model\.safetensors lacks tensor .*experts\.3\.up_proj.*\[32, 64\]"
    ):
        load(published)


def test_misshapen_tensors_are_named(published: Path) -> None:
    rewrite(published, lambda tensors: tensors.update({NAME: torch.zeros(31, 64)}))
    with pytest.raises(
        InputError, match=r"experts\.3\.up_proj.* has shape \[31, 64\], expected \[32, 64\]"
    ):
        load(published)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_integers_are_no_weights(published: Path, dtype: torch.dtype) -> None:
    rewrite(published, lambda tensors: tensors.update({NAME: tensors[NAME].to(dtype)}))
    with pytest.raises(
        InputError,
        match=r"model\.safetensors: tensor .*experts\.3\.up_proj.* holds \w+, expected",
    ):
        load(published)


def test_unexpected_tensors_are_named(published: Path) -> None:
    rewrite(
        published,
        lambda tensors: tensors.update({f"extra.{index}": torch.zeros(1) for index in range(5)}),
    )
    with pytest.raises(
        InputError, match=r"holds 5 tensors \(`extra\.0`, `extra\.1`, `extra\.2`, …\)"
    ):
        load(published)


def test_stored_rotary_frequencies_are_harmless(published: Path) -> None:
    rewrite(
        published, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.zeros(4)})
    )
    assert_same_weights(load(published), load(GOLDEN))


def test_misshapen_merged_tensors_are_named(merged: Path) -> None:
    name = "model.layers.2.mlp.experts.gate_proj"
    rewrite(merged, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    with pytest.raises(
        InputError, match=r"experts\.gate_proj` has shape \[7, 32, 64\], expected \[8, 32, 64\]"
    ):
        load(merged)


@pytest.mark.parametrize("size", [0, 5, 100, 500_000])
def test_truncated_files_are_named(published: Path, size: int) -> None:
    file = published / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(InputError, match=r"model\.safetensors is (truncated|not a readable)"):
        load(published)


@pytest.mark.parametrize(
    "header", [b"not json at all", b"[1, 2]", b'{"a": {"shape": 3}}', b'{"a": []}', b"\xff\xfe{}"]
)
def test_unreadable_headers_are_named(published: Path, header: bytes) -> None:
    (published / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match=r"model\.safetensors is not a readable"):
        load(published)


def test_missing_shards_are_named(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(InputError, match=f"{victim.name} is missing"):
        load(sharded)


def test_shards_that_contradict_their_index_are_named(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    tensors = load_file(victim)
    name, _ = tensors.popitem()
    save_file(tensors, victim, {"format": "pt"})
    with pytest.raises(InputError, match=f"{victim.name} lacks tensor `{name}`"):
        load(sharded)


def test_unreadable_indexes_are_named(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text("{")
    with pytest.raises(InputError, match=r"index\.json is not a readable index"):
        load(sharded)


def test_a_config_of_another_model_is_noticed(published: Path) -> None:
    edit_config(published, num_hidden_layers=4)
    with pytest.raises(InputError, match=r"lacks .*layers\.3"):
        load(published)


def test_unusual_requests_are_left_to_transformers(published: Path) -> None:
    """Weights given by hand: the damaged file is never looked at."""
    tensors = load(GOLDEN).state_dict()
    (published / "model.safetensors").write_bytes(b"")
    model = LLaDA2MoeModelLM.from_pretrained(
        None, config=AutoConfig.from_pretrained(published), state_dict=tensors
    )
    assert_same_weights(model, load(GOLDEN))


def test_loading_is_checked_before_any_weight_is_read(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(published, lambda tensors: tensors.pop(NAME))

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("loading began")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", forbidden)
    with pytest.raises(InputError):
        LLaDA2MoeModelLM.from_pretrained(published)
