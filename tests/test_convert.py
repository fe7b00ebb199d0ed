"""From an autoregressive checkpoint to one that can learn to decode blocks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import Dmax, dmax_fixture  # noqa: F401  (fixture)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from dmax import LLM, DecodingParams, tiny
from dmax.checkpoint import load_checkpoint, save_checkpoint
from dmax.convert import convert_checkpoint
from dmax.errors import InputError

WORDS = ["<unk>", "<eos>", *(f"w{number}" for number in range(38))]  # 40 tokens
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
}


def write(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """An autoregressive checkpoint with a tokenizer of 40 words."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{"vocab_size": 40, **SIZES, **changes})
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    return folder


def config(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return record


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab_size", [40, 64])
def test_all_weights_but_the_mask_row_are_as_they_were(
    kind: str, tied: bool, vocab_size: int, tmp_path: Path
) -> None:
    changes = {"tie_word_embeddings": tied, "vocab_size": vocab_size}
    source = write(tmp_path / "source", kind, **changes)
    convert_checkpoint(source, tmp_path / "made", block_length=16)
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "made" / "model.safetensors")
    assert before.keys() == after.keys() and (HEAD in after) is not tied
    for name, weight in after.items():
        assert weight.dtype == torch.bfloat16
        if name not in (EMBEDDING, HEAD):
            assert torch.equal(weight, before[name])
            continue
        assert len(weight) == max(vocab_size, 41)  # a spare row is taken before one is made
        kept = torch.arange(len(before[name])) != 40
        assert torch.equal(weight[: len(before[name])][kept], before[name][kept])
        torch.testing.assert_close(weight[40], before[name][:40].float().mean(0).bfloat16())


def test_the_files_name_what_decoding_asks_for(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    made = convert_checkpoint(source, tmp_path / "made", block_length=16, shift=True)
    assert (made.special_ids.mask_token_id, made.special_ids.block_length) == (40, 16)
    record = config(tmp_path / "made")
    changed = {"mask_token_id": 40, "block_length": 16, "shift": True, "vocab_size": 41}
    assert record.items() >= changed.items()
    same = config(source).keys() - changed.keys() - {"transformers_version"}
    assert {name: record[name] for name in same} == {name: config(source)[name] for name in same}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<|mask|>", 40)
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    read = load_checkpoint(tmp_path / "made", dtype="auto", device="cpu")
    assert read.special_ids == made.special_ids and read.decoding is None
    convert_checkpoint(source, tmp_path / "at", shift=False)
    assert config(tmp_path / "at").items() >= {"shift": False, "block_length": 32}.items()


def test_the_result_decodes_blocks(tmp_path: Path) -> None:
    convert_checkpoint(write(tmp_path / "source"), tmp_path / "made", block_length=8)
    params = DecodingParams(max_new_tokens=16, ignore_eos=True)
    [output] = LLM(tmp_path / "made").generate([[2, 3, 4]], params)
    assert len(output.token_ids) == 16 and 40 not in output.token_ids


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_shifted_result_still_writes_what_the_original_does(kind: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source", kind, initializer_range=0.3)
    convert_checkpoint(source, tmp_path / "made", shift=True)
    params = DecodingParams(strategy="autoregressive", block_length=1, max_new_tokens=24)
    llm = LLM(str(tmp_path / "made"), dtype="float32")
    prompts = [[2, 3, 4], [5], list(range(6, 30))]
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
        ids = torch.tensor([prompt])
        written = original.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
        )
        expected = written[0, len(prompt) :].tolist()
        assert list(output.token_ids) == [token for token in expected if token != 1]


def test_a_mask_token_of_the_tokenizer_stays(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"mask_token": "w7"})
    tokenizer.save_pretrained(source)
    convert_checkpoint(source, tmp_path / "made")
    assert config(tmp_path / "made")["mask_token_id"] == WORDS.index("w7")
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "made" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in after)


def add_mask_to_tokenizer(source: Path, mask: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"mask_token": mask})
    tokenizer.save_pretrained(source)


def test_a_mask_token_of_the_tokenizer_without_a_row_gets_one(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    add_mask_to_tokenizer(source, "<m>")
    assert convert_checkpoint(source, tmp_path / "made").special_ids.mask_token_id == 40
    assert AutoTokenizer.from_pretrained(tmp_path / "made").mask_token == "<m>"
    before = load_file(source / "model.safetensors")[HEAD]
    after = load_file(tmp_path / "made" / "model.safetensors")[HEAD]
    assert torch.equal(after[:40], before) and len(after) == 41
    torch.testing.assert_close(after[40], before.float().mean(0).bfloat16())


def test_all_rows_that_the_table_lacked_are_the_mean_of_those_it_had(tmp_path: Path) -> None:
    source = write(tmp_path / "source", vocab_size=35)  # and the tokenizer knows 40
    convert_checkpoint(source, tmp_path / "made")
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "made" / "model.safetensors")
    for name in (EMBEDDING, HEAD):
        mean = before[name].float().mean(0).bfloat16()
        assert torch.equal(after[name], torch.cat((before[name], mean.expand(6, -1))))


@pytest.mark.parametrize("wide", [["model.norm.weight"], [EMBEDDING, HEAD], None])
def test_files_of_a_wider_dtype_than_the_config_names_are_not_rounded(
    wide: list[str] | None, tmp_path: Path
) -> None:
    source = write(tmp_path / "source", vocab_size=64)
    weights = load_file(source / "model.safetensors")
    for name in wide or list(weights):
        weights[name] = torch.rand(weights[name].shape)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    assert config(source)["dtype"] == "bfloat16"
    convert_checkpoint(source, tmp_path / "made")
    for name, after in load_file(tmp_path / "made" / "model.safetensors").items():
        assert after.dtype == torch.float32
        kept = torch.arange(len(after)) != (40 if name in (EMBEDDING, HEAD) else -1)
        assert torch.equal(after[kept], weights[name][kept].float())


def test_files_with_other_names_are_not_rounded(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "gpt2", n_positions=64)
    prefix = "transformer."
    weights = load_file(source / "model.safetensors")
    assert all(name.startswith(prefix) for name in weights)
    # As the published GPT-2 has them.
    wide = {name.removeprefix(prefix): torch.rand(each.shape) for name, each in weights.items()}
    save_file(wide, source / "model.safetensors", {"format": "pt"})
    assert config(source)["dtype"] == "bfloat16"
    convert_checkpoint(source, tmp_path / "made")
    for name, after in load_file(tmp_path / "made" / "model.safetensors").items():
        before = wide[name.removeprefix(prefix)]
        assert torch.equal(after[: len(before)], before)


def test_what_the_generation_config_says_besides_stays(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    said = {"bos_token_id": 5, "eos_token_id": [1, 7], "do_sample": True, "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(said))
    convert_checkpoint(source, tmp_path / "made")
    written = json.loads((tmp_path / "made" / "generation_config.json").read_text())
    assert written.items() >= said.items()


def test_adapters_are_merged_and_converted(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    source = write(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    adapted.save_pretrained(tmp_path / "adapters")
    convert_checkpoint(tmp_path / "adapters", tmp_path / "made", shift=True)
    query = "model.layers.0.self_attn.q_proj.weight"
    merged = adapted.merge_and_unload().state_dict()[query]
    made = load_file(tmp_path / "made" / "model.safetensors")[query]
    torch.testing.assert_close(made.float(), merged, atol=0.01, rtol=0.01)
    assert (merged - load_file(source / "model.safetensors")[query].float()).abs().max() > 0.1
    assert config(tmp_path / "made")["mask_token_id"] == 40


def test_one_whose_tokenizer_has_a_mask_token_is_decoded_as_its_error_says(tmp_path: Path) -> None:
    source = write(tmp_path / "source", initializer_range=0.3)
    add_mask_to_tokenizer(source, "w7")  # as those of Cohere and Gemma may
    with pytest.raises(InputError, match="names no block length") as error:
        LLM(str(source))
    assert "`dmax convert`" in str(error.value.hint)
    assert "`block_length` 1 and `shift` true" in str(error.value.hint)
    llm = LLM(str(source), dtype="float32", block_length=1, shift=True)
    [output] = llm.generate([[2, 3, 4]], DecodingParams(max_new_tokens=8))
    ids = torch.tensor([[2, 3, 4]])
    written = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        do_sample=False,
        suppress_tokens=[WORDS.index("w7")],
    )
    assert list(output.token_ids) == [token for token in written[0, 3:].tolist() if token != 1]


def test_a_link_is_written_through(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    big = tmp_path / "disk" / "big"
    big.mkdir(parents=True)
    link = tmp_path / "made"
    link.symlink_to(big)
    for block_length in (8, 16):
        convert_checkpoint(source, link, block_length=block_length)
        assert link.is_symlink() and config(big)["block_length"] == block_length
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["disk", "made", "source"]
    assert list(big.parent.iterdir()) == [big]


@pytest.mark.parametrize("name", ["old.model/thesis.txt", "mine.safetensors", "notes.model"])
def test_what_others_put_into_an_earlier_result_is_kept(name: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    convert_checkpoint(source, tmp_path / "made")
    mine = tmp_path / "made" / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("years of work")
    refused(source, tmp_path / "made", "exists and was not written by dmax")
    assert mine.read_text() == "years of work"


def test_an_earlier_result_is_replaced(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    for block_length in (8, 16):
        convert_checkpoint(source, tmp_path / "made", block_length=block_length)
    assert config(tmp_path / "made")["block_length"] == 16
    origin = json.loads((tmp_path / "made" / "dmax.json").read_text())
    assert origin == {"converted_from": str(source)}


# ---- bad input -----------------------------------------------------------------------------------


def refused(source: Path | str, target: Path, *parts: str, **options: Any) -> None:
    existed = target.exists()
    with pytest.raises(InputError) as error:
        convert_checkpoint(source, target, **options)
    for part in parts:
        assert part in f"{error.value.message} {error.value.hint}"
    assert target.exists() is existed


@pytest.mark.parametrize("name", [*tiny.BUNDLED])
def test_a_llada2_decodes_blocks_already(name: str, tmp_path: Path) -> None:
    refused(name, tmp_path / "made", "diffusion model already", "mask_token_id")


def test_a_published_family_decodes_blocks_already(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "sdar")
    refused(source, tmp_path / "made", "diffusion model already", "of the type sdar")


def test_what_was_converted_is_not_converted_again(tmp_path: Path) -> None:
    convert_checkpoint(write(tmp_path / "source"), tmp_path / "made")
    refused(tmp_path / "made", tmp_path / "again", "diffusion model already", "model.path")


def test_a_model_without_a_tokenizer_cannot_know_the_mask(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    for file in source.glob("token*"):
        file.unlink()
    refused(source, tmp_path / "made", "no tokenizer")


@pytest.mark.parametrize("block_length", [0, -1, 65, 2**40, 1.5, True, "8"])
def test_a_block_length_fits_into_the_context(block_length: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    refused(source, tmp_path / "made", "block_length", block_length=block_length)


def test_other_folders_stay_as_they_are(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    refused(source, mine, "exists and was not written by dmax")
    other = write(tmp_path / "other", "qwen3")
    (tmp_path / "link").symlink_to(source)
    before = {file: file.read_bytes() for folder in (source, other) for file in folder.iterdir()}
    for target in (other, source, tmp_path / "link"):
        refused(source, target, "exists and was not written by dmax")
    assert before == {file: file.read_bytes() for file in before}


def test_what_was_trained_is_not_replaced(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    made = convert_checkpoint(source, tmp_path / "made")
    trained = tmp_path / "trained"
    save_checkpoint(made.model, made.tokenizer, trained, made.special_ids, extra={"steps": 100})
    refused(source, trained, "dmax.json exists and was not written by this command")
    assert json.loads((trained / "dmax.json").read_text()) == {"steps": 100}


def test_adapters_of_a_diffusion_model_are_merged_otherwise(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "tiny-base"}')
    refused(folder, tmp_path / "made", "diffusion model already", "dmax.convert.merge_adapters")


def test_a_mask_token_takes_no_id_of_a_word(tmp_path: Path) -> None:
    source = write(tmp_path / "source", vocab_size=64)
    record = json.loads((source / "tokenizer.json").read_text())
    vocab = record["model"]["vocab"]
    vocab["far"] = len(vocab) + 1  # the next token would be the one of this id
    (source / "tokenizer.json").write_text(json.dumps(record))
    refused(source, tmp_path / "made", "a mask token would get the id 41, which is that of 'far'")


def test_the_current_folder_and_mounts_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "source")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output in (Path(), tmp_path / "here"):
        refused(source, output, "it is the current folder or a mount point", "inside it")
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "volume")
    refused(source, tmp_path / "volume", "it is the current folder or a mount point", "inside it")


def test_a_network_that_cannot_see_ahead_is_refused(tmp_path: Path) -> None:
    changes = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}
    source = write(tmp_path / "source", "qwen3", **changes)
    refused(source, tmp_path / "made", "cannot be a block-diffusion backbone", "sliding_window")


def test_a_window_that_is_no_number_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    (source / "config.json").write_text(json.dumps({**config(source), "sliding_window": "a"}))
    refused(source, tmp_path / "made", "cannot be a block-diffusion backbone", "sliding_window")


def test_a_hint_about_ends_can_be_followed(tmp_path: Path) -> None:
    source = write(tmp_path / "source", eos_token_id=None)
    (source / "generation_config.json").unlink()
    edited = json.loads((source / "tokenizer_config.json").read_text())
    del edited["eos_token"]
    (source / "tokenizer_config.json").write_text(json.dumps(edited))
    refused(source, tmp_path / "made", "no end-of-sequence token", "name it in config.json")
    (source / "config.json").write_text(json.dumps({**config(source), "eos_token_id": 77}))
    refused(source, tmp_path / "made", "outside the vocabulary", "in the checkpoint's files")
    (source / "config.json").write_text(json.dumps({**config(source), "eos_token_id": 1}))
    assert convert_checkpoint(source, tmp_path / "made").special_ids.eos_token_ids == (1,)


def test_a_name_that_leads_nowhere_and_damaged_weights(tmp_path: Path) -> None:
    refused("nobody/nothing", tmp_path / "made", "nor reachable on the hub")
    source = write(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    refused(source, tmp_path / "made", "lacks 1 weights")


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_says_what_is_next(tmp_path: Path, dmax: Dmax) -> None:
    source, made = write(tmp_path / "source"), tmp_path / "made"
    result = dmax("convert", source, "-o", made, "--block-length", 8, "--shift")
    assert (result.code, result.out) == (0, f"{made}\n")
    assert "mask token 40, blocks of 8; a prediction is read one position before" in result.err
    assert "dmax train recipes/convert_1_warmup.yaml" in result.err
    assert f"`model.path: {made}`" in result.err
    assert config(made).items() >= {"block_length": 8, "shift": True}.items()
    shutil.rmtree(made)
    result = dmax("convert", source, "-o", made, "--json")
    expected = {"checkpoint": str(made), "mask_token_id": 40, "block_length": 32, "shift": False}
    assert json.loads(result.out) == expected


def test_the_command_refuses_in_one_sentence(tmp_path: Path, dmax: Dmax) -> None:
    result = dmax("convert", "tiny-dmax", "-o", tmp_path / "made")
    assert (result.code, result.out) == (2, "")
    assert "tiny-dmax is a diffusion model already" in result.err
    assert not (tmp_path / "made").exists()


def test_the_command_refuses_a_model_of_text_and_images(tmp_path: Path, dmax: Dmax) -> None:
    source = write(tmp_path / "source")
    composite = {"model_type": "gemma3", "text_config": {"vocab_size": 40}}
    (source / "config.json").write_text(json.dumps(composite))
    result = dmax("convert", source, "-o", tmp_path / "made")
    assert (result.code, result.out) == (2, "")
    assert "only text decoders are read" in result.err
