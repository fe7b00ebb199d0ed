"""Dense decoders of transformers as block-diffusion models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from dmax import LLM, DecodingParams
from dmax.attention import block_causal, dense_mask
from dmax.baselines.rollouts import soft_oput_loss
from dmax.cache import BlockCache
from dmax.checkpoint import Checkpoint, load_checkpoint, new_checkpoint, save_checkpoint
from dmax.engine.runner import ModelRunner
from dmax.errors import InputError
from dmax.models import backbone
from dmax.recipe.run import blend_weights, run_recipe
from dmax.recipe.sections import load_recipe
from dmax.training.clean_stream import NoisyBatch

BLOCK = 8
VOCAB = 64
EOS = 2
MASK = 3
KINDS = ["llama", "qwen3"]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_attention = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def tiny_config(kind: str, **changes: Any) -> PreTrainedConfig:
    fields: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=kind == "llama",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    return CONFIG_MAPPING[kind](**{**fields, **changes})


def tiny(kind: str, attention: str = "sdpa", **changes: Any) -> Checkpoint:
    torch.manual_seed(0)
    config = tiny_config(kind, **{"mask_token_id": MASK, "block_length": BLOCK, **changes})
    return new_checkpoint(config, attn_implementation=attention)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(4, VOCAB, (2, 3 * BLOCK), generator=torch.Generator().manual_seed(1))


def causal(length: int) -> Tensor:
    position = torch.arange(length)
    return dense_mask(block_causal(BLOCK), position, position)[None, None]  # [1, 1, L, L]


# ---- visibility and cache -----------------------------------------------------------------------


@torch.no_grad()
@each_kind
@each_attention
def test_block_by_block_through_the_cache_equals_one_block_causal_forward(
    kind: str, attention: str, ids: Tensor
) -> None:
    model = tiny(kind, attention).model
    expected = model(input_ids=ids, attention_mask=causal(ids.shape[1])).logits
    cache = BlockCache(2, 2, 3 * BLOCK, 2, 8)
    slots = [0, 1]
    for start in range(0, ids.shape[1], BLOCK):
        window = cache.write_at(slots, BLOCK)
        block = slice(start, start + BLOCK)
        logits = model(
            inputs_embeds=model.get_input_embeddings()(ids[:, block]),
            attention_mask=torch.ones(2, 1, BLOCK, start + BLOCK, dtype=torch.bool),
            position_ids=window.positions,
            past_key_values=window,
        ).logits
        torch.testing.assert_close(logits, expected[:, block], atol=1e-5, rtol=1e-5)
        cache.commit(slots, BLOCK)


@torch.no_grad()
@each_kind
@each_attention
def test_the_mask_alone_decides_what_a_position_sees(
    kind: str, attention: str, ids: Tensor
) -> None:
    model = tiny(kind, attention).model
    changed = ids.clone()
    last = 2 * BLOCK - 1  # of the second block
    changed[:, last] = 4 + (changed[:, last] - 3) % (VOCAB - 4)
    visible = causal(ids.shape[1])
    before = model(input_ids=ids, attention_mask=visible).logits
    after = model(input_ids=changed, attention_mask=visible).logits
    assert torch.equal(before[:, :BLOCK], after[:, :BLOCK])
    moved = (before - after).abs().amax(dim=-1)
    assert (moved[:, BLOCK:] > 1e-3).all()  # the second and the third block see it


@torch.no_grad()
@each_kind
@each_attention
def test_without_a_mask_everything_is_visible(kind: str, attention: str, ids: Tensor) -> None:
    model = tiny(kind, attention).model
    assert not any(layer.self_attn.is_causal for layer in model.model.layers)
    everything = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
    expected = model(input_ids=ids, attention_mask=everything).logits
    for logits in (
        model(ids).logits,
        model(inputs_embeds=model.get_input_embeddings()(ids)).logits,
    ):
        torch.testing.assert_close(logits, expected)
    base = model.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(model.get_output_embeddings()(base), expected)
    assert not torch.allclose(
        expected, model(ids, attention_mask=causal(ids.shape[1])).logits, atol=1e-2
    )


@torch.no_grad()
def test_without_a_mask_what_the_cache_holds_is_visible_too(ids: Tensor) -> None:
    model = tiny("llama").model
    cache = BlockCache(2, 2, 3 * BLOCK, 2, 8)
    inputs: dict[str, Any] = {"attention_mask": torch.ones(1, 1, BLOCK, BLOCK, dtype=torch.bool)}
    window = cache.write_at([0, 1], BLOCK)
    model(ids[:, :BLOCK], **inputs, position_ids=window.positions, past_key_values=window)
    cache.commit([0, 1], BLOCK)
    window = cache.write_at([0, 1], BLOCK)
    logits = model(
        ids[:, BLOCK : 2 * BLOCK], position_ids=window.positions, past_key_values=window
    ).logits
    expected = model(ids[:, : 2 * BLOCK], attention_mask=causal(2 * BLOCK)).logits[:, BLOCK:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", backbone.LINEAR_HEADS)
def test_logits_of_a_linear_head_are_hidden_states_times_output_embeddings(
    kind: str, ids: Tensor
) -> None:
    model: Any = tiny(kind).model
    assert model.has_linear_head
    hidden = model.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(
        hidden @ model.get_output_embeddings().weight.T, model(input_ids=ids).logits
    )


def test_a_head_that_scales_its_logits_is_not_linear() -> None:
    assert not tiny("granite", logits_scaling=3.0).model.has_linear_head


# ---- decoding -----------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("strategy", ["spd", "threshold"])
def test_a_folder_is_decoded_alone_as_in_a_batch(kind: str, strategy: str, tmp_path: Path) -> None:
    checkpoint = tiny(kind)
    save_checkpoint(checkpoint.model, None, tmp_path / "model", checkpoint.special_ids)
    llm, params = (
        LLM(str(tmp_path / "model"), dtype="float32"),
        DecodingParams(strategy=strategy, max_new_tokens=20),
    )
    prompts = [[5, 6, 7], list(range(10, 10 + 2 * BLOCK)), [9] * (BLOCK + 1)]
    together = llm.generate(prompts, params)
    assert [llm.generate(prompt, params)[0] for prompt in prompts] == together
    for output in together:
        assert 0 < len(output.token_ids) <= 20
        assert MASK not in output.token_ids


# ---- training -----------------------------------------------------------------------------------


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    noisy = ids.clone()
    noisy[:, BLOCK::2] = MASK
    labels = torch.where(torch.arange(ids.shape[1]) < BLOCK, -100, ids)
    batch = NoisyBatch(ids, noisy[:, BLOCK:], labels[:, BLOCK:])
    model.zero_grad()
    thresholds = torch.zeros(len(ids), 1)
    loss = soft_oput_loss(model, batch, thresholds, block_length=BLOCK, mask_token_id=MASK).total
    assert torch.isfinite(loss)
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@each_kind
def test_an_oput_step_reaches_every_weight(kind: str, ids: Tensor) -> None:
    for name, gradient in gradients(tiny(kind).model.train(), ids).items():
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().sum() > 0, name


@each_kind
def test_gradient_checkpointing_keeps_the_clean_context(kind: str, ids: Tensor) -> None:
    model: Any = tiny(kind).model.train()
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    for name, gradient in gradients(model, ids).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_weights_are_averaged_once_though_they_are_tied() -> None:
    one = tiny("llama").model
    other = tiny("llama", initializer_range=0.1).model
    expected = {
        name: 0.75 * w + 0.25 * other.state_dict()[name] for name, w in one.state_dict().items()
    }
    blend_weights(one, other.state_dict(), 0.25)
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(weight, expected[name], msg=name)


# ---- files --------------------------------------------------------------------------------------


@torch.no_grad()
@each_kind
def test_plain_transformers_reads_what_is_saved(kind: str, tmp_path: Path, ids: Tensor) -> None:
    checkpoint = tiny(kind)
    model = checkpoint.model
    save_checkpoint(model, None, tmp_path / "model", checkpoint.special_ids)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert (type(plain), plain.config.architectures) == (type(model), [type(model).__name__])
    assert "model.layers.0.self_attn.q_proj.weight" in load_file(
        tmp_path / "model" / "model.safetensors"
    )
    visible = causal(ids.shape[1])  # of the two only ours is told what "no mask" means
    torch.testing.assert_close(
        plain(ids, attention_mask=visible).logits, model(ids, attention_mask=visible).logits
    )
    assert not torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-2)


def autoregressive(folder: Path, vocab_size: int = 10) -> Path:
    """A Llama and its tokenizer of ten words, as published: no mask token, no block length."""
    words = ["<pad>", "<bos>", "<eos>", "one", "two", "three", "plus", "is", "what", "?"]
    backend = Tokenizer(
        WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>")
    )
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("llama", vocab_size=vocab_size)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> Checkpoint:
    return load_checkpoint(folder, dtype=torch.float32, device="cpu", **options)


def test_an_autoregressive_checkpoint_says_what_it_lacks(tmp_path: Path) -> None:
    folder = autoregressive(tmp_path / "llama")
    with pytest.raises(InputError, match="names no mask token") as error:
        load(folder)
    for way in ("`dmax convert`", "`add_mask_token: true` in a recipe"):
        assert way in str(error.value.hint)
    with pytest.raises(InputError, match="names no block length"):
        load(folder, mask_token_id=9)
    assert load(folder, mask_token_id=9, block_length=4).special_ids.mask_token_id == 9


@pytest.mark.parametrize(("vocab_size", "expected"), [(10, 11), (16, 16)])
def test_a_mask_token_is_added(tmp_path: Path, vocab_size: int, expected: int) -> None:
    """The second model has rows to spare."""
    folder = autoregressive(tmp_path / "llama", vocab_size)
    checkpoint = load(folder, add_mask_token=True, block_length=4)
    assert checkpoint.special_ids.mask_token_id == 10
    assert checkpoint.model.config.vocab_size == expected
    assert checkpoint.tokenizer is not None
    assert checkpoint.tokenizer.encode("one <|mask|>") == [3, 10]
    published = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    weight = checkpoint.model.get_input_embeddings().weight
    assert torch.equal(weight[:10], published[:10])
    torch.testing.assert_close(weight[10], published[:10].mean(dim=0))
    assert checkpoint.model.get_output_embeddings().weight is weight  # still tied


def test_a_mask_token_is_added_once_and_to_a_tokenizer(tmp_path: Path) -> None:
    folder = autoregressive(tmp_path / "llama")
    with pytest.raises(InputError, match="has a mask token already"):
        load("tiny-dmax", add_mask_token=True)  # type: ignore[arg-type]
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        load(folder, add_mask_token=True, block_length=4)


# ---- recipes ------------------------------------------------------------------------------------


def write_recipe(folder: Path, model: dict[str, Any], **training: Any) -> Path:
    file = folder / "data.jsonl"
    lines = [{"prompt": "what is one plus two ?", "response": "one plus two is three"}] * 4
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fields = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "warmup_steps": 0,
        "learning_rate": 0.01,
        "use_cpu": True,
    }
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    recipe = {
        "output_dir": str(folder / "out"),
        "model": model,
        "data": {"file": str(file)},
        "training": fields | quiet | training,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def test_a_recipe_turns_an_autoregressive_checkpoint_into_a_diffusion_model(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("datasets")
    model = {
        "path": str(autoregressive(tmp_path / "llama")),
        "add_mask_token": True,
        "block_length": 4,
    }
    folder = run_recipe(load_recipe(write_recipe(tmp_path, model)))
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert (config["mask_token_id"], config["block_length"], config["vocab_size"]) == (10, 4, 11)
    assert AutoTokenizer.from_pretrained(folder).mask_token == "<|mask|>"
    (output,) = LLM(str(folder)).generate(
        "what is one plus two ?", DecodingParams(max_new_tokens=8)
    )
    assert 10 not in output.token_ids
    (tmp_path / "again").mkdir()
    with pytest.raises(InputError, match="has a mask token already"):
        run_recipe(load_recipe(write_recipe(tmp_path / "again", model | {"path": str(folder)})))


@pytest.mark.parametrize("objective", ["oput", "d2f"])  # two streams over a cache, and one without
def test_a_recipe_trains_a_new_model_of_another_architecture(
    tmp_path: Path, objective: str
) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("datasets")
    shape = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = {
        "model_type": "qwen3",
        "block_length": 8,
        "head_dim": 8,
        "num_key_value_heads": 1,
        **shape,
    }
    folder = run_recipe(
        load_recipe(write_recipe(tmp_path, {"config": config}, objective=objective))
    )
    assert load(folder).special_ids.block_length == 8
    assert type(load(folder).model).__name__ == "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"config": {"model_type": "lama"}}, r":\d+: unknown model type 'lama'"),
        (
            {"config": {"model_type": "llama", "num_experts": 4}},
            "unknown key `model.config.num_experts`",
        ),
        ({"config": {"model_type": "llama"}, "block_length": 8}, "belong to a `path`"),
        ({"config": {"model_type": "llama"}, "add_mask_token": True}, "belong to a `path`"),
    ],
)
def test_recipes_name_what_is_wrong_with_a_model(
    tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(write_recipe(tmp_path, model))


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_heads_that_its_architecture_does_not_know_are_named_when_it_decodes(kind: str) -> None:
    config = CONFIG_MAPPING[kind](
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=32,
        word_embed_proj_dim=32,
        bos_token_id=1,
        eos_token_id=EOS,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        mask_token_id=MASK,
        block_length=BLOCK,
    )
    checkpoint = new_checkpoint(config)
    runner = ModelRunner(checkpoint.model, checkpoint.special_ids, 1, 2 * BLOCK)
    with pytest.raises(InputError, match="has 4 heads of 8 .* config.json says 2 of 8"):
        runner.prefill([0], torch.full((1, BLOCK), 5))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mistral", {"sliding_window": 16}, "see only a part of the context .`sliding_window` 16"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
            "see only a part of the context",
        ),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}, "keys and values are of different sizes"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "transformers' attention interface"),
        (
            "phi3",
            {
                "original_max_position_embeddings": 64,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 64,
                },
            },
            "depend on the longest sequence",
        ),
    ],
)
def test_models_that_would_not_obey_the_mask_are_refused(
    kind: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        tiny(kind, "eager", **changes)
    assert "Llama" in str(error.value.hint)


def test_a_window_as_long_as_the_context_is_no_window(ids: Tensor) -> None:
    assert tiny("mistral", sliding_window=256).model(ids).logits.shape == (2, 3 * BLOCK, VOCAB)


def test_attention_that_takes_no_mask_is_refused() -> None:
    model = tiny("llama").model
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        InputError, match="must be one of sdpa, eager, flex_attention, got 'flash_attention_2'"
    ):
        backbone.as_block_diffusion(model)


def test_configurations_without_a_causal_language_model_are_refused() -> None:
    with pytest.raises(InputError, match="no model can be made"):
        new_checkpoint(
            PreTrainedConfig(mask_token_id=1, eos_token_id=2, block_length=8, vocab_size=4)
        )


# ---- documentation ------------------------------------------------------------------------------


def test_the_page_about_backbones_runs_as_written() -> None:
    text = (Path(__file__).parents[2] / "docs" / "backbones.md").read_text(encoding="utf-8")
    programs = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert programs
    namespace: dict[str, Any] = {}
    for program in programs:
        exec(program, namespace)
