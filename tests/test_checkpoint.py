"""From names to ready checkpoints: special ids, decoding, whole saves and clear errors."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, PreTrainedTokenizerFast

from dmax import tiny
from dmax.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dmax.errors import InputError
from dmax.special_ids import SpecialIds

GOLDEN = Path(__file__).parent / "golden" / "llada2_moe_a"
IDS: dict[str, Any] = {"mask_token_id": 511, "eos_token_id": 508}


def load(path: Path | str, **options: Any) -> Checkpoint:
    return load_checkpoint(path, **{"dtype": torch.float32, "device": "cpu", **options})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint without tokenizer that names neither MASK nor EOS."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / name, folder / name)
    return folder


def edit(file: Path, **changes: Any) -> None:
    record = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**record, **changes}))


def add_tokenizer(folder: Path, **special: str) -> PreTrainedTokenizerFast:
    vocabulary = {"a": 0, "<eos>": 490, "<pad>": 491, "<|mask|>": 492, "<blank>": 493}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


# ---- special ids ---------------------------------------------------------------------------------


def test_arguments_decide_and_the_family_knows_its_block_length(folder: Path) -> None:
    found = load(folder, **IDS)
    assert found.special_ids == SpecialIds(511, (508,), 508, 32)
    assert (found.tokenizer, found.path) == (None, str(folder))
    assert not found.model.training


def test_mask_comes_from_argument_config_tokenizer_vocabulary_in_that_order(folder: Path) -> None:
    add_tokenizer(folder, eos_token="<eos>")
    assert load(folder).special_ids.mask_token_id == 492
    add_tokenizer(folder, eos_token="<eos>", mask_token="<blank>")
    assert load(folder).special_ids.mask_token_id == 493
    edit(folder / "config.json", mask_token_id=0)
    assert load(folder).special_ids.mask_token_id == 0
    assert load(folder, mask_token_id=7).special_ids.mask_token_id == 7


def test_eos_comes_from_argument_generation_config_config_tokenizer_in_that_order(
    folder: Path,
) -> None:
    add_tokenizer(folder, eos_token="<eos>")
    assert load(folder).special_ids.eos_token_ids == (490,)
    edit(folder / "config.json", eos_token_id=[5, 6])
    assert load(folder).special_ids.eos_token_ids == (5, 6)
    edit(folder / "generation_config.json", eos_token_id=[0, 8, 0])
    assert load(folder).special_ids.eos_token_ids == (0, 8)
    assert load(folder, eos_token_id=9).special_ids.eos_token_ids == (9,)
    assert load(folder, eos_token_id=[9, 3]).special_ids.eos_token_ids == (9, 3)


def test_pad_comes_from_tokenizer_config_eos_in_that_order(folder: Path) -> None:
    edit(folder / "config.json", pad_token_id=None)
    assert load(folder, **IDS).special_ids.pad_token_id == 508
    edit(folder / "config.json", pad_token_id=4)
    assert load(folder, **IDS).special_ids.pad_token_id == 4
    add_tokenizer(folder, pad_token="<pad>")
    assert load(folder, **IDS).special_ids.pad_token_id == 491


def test_block_length_comes_from_argument_config_family_in_that_order(folder: Path) -> None:
    assert load(folder, **IDS).special_ids.block_length == 32
    edit(folder / "config.json", block_length=16)
    assert load(folder, **IDS).special_ids.block_length == 16
    assert load(folder, **IDS, block_length=4).special_ids.block_length == 4


def test_what_nobody_names_must_be_passed(folder: Path) -> None:
    for missing in IDS:
        with pytest.raises(InputError) as error:
            load(folder, **{name: value for name, value in IDS.items() if name != missing})
        assert f"`{missing}`" in str(error.value.hint)


@pytest.mark.parametrize("eos", [511, [508, 511]])
def test_a_mask_that_ends_sequences_is_refused(folder: Path, eos: Any) -> None:
    with pytest.raises(InputError, match="`mask_token_id` 511 is also an `eos_token_id`"):
        load(folder, mask_token_id=511, eos_token_id=eos)
    edit(folder / "config.json", mask_token_id=511, eos_token_id=eos)
    with pytest.raises(InputError, match="`mask_token_id` 511 is also an `eos_token_id`"):
        load(folder)
    with pytest.raises(InputError, match="is also an"):
        replace(SpecialIds(1, (2,), 2, 8), mask_token_id=2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mask_token_id": True},
        {"mask_token_id": [511]},
        {"mask_token_id": "511"},
        {"mask_token_id": 511.0},
        {"eos_token_id": [[508]]},
        {"eos_token_id": [508, None]},
        {"eos_token_id": {"a": 1}},
        {"eos_token_id": np.array([508, 509])},
    ],
    ids=str,
)
def test_ids_of_another_shape_are_refused(folder: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"`{next(iter(wrong))}` must be a token id, got "):
        load(folder, **{**IDS, **wrong})


def test_ids_of_numpy_are_taken(folder: Path) -> None:
    ids = {name: np.int64(value) for name, value in IDS.items()}
    found = load(folder, **ids).special_ids
    assert found == SpecialIds(511, (508,), 508, 32)
    assert type(found.mask_token_id) is type(found.eos_token_ids[0]) is int


@pytest.mark.parametrize(
    "length", [0, -1, 4097, 10**400, True, 8.0, "8", [8]], ids=lambda length: str(length)[:5]
)
def test_absurd_block_lengths_are_refused(folder: Path, length: Any) -> None:
    with pytest.raises(InputError, match="`block_length` must be a whole number between 1 and"):
        load(folder, **IDS, block_length=length)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mask_token_id": 512},
        {"mask_token_id": -1},
        {"mask_token_id": 10**400},
        {"eos_token_id": [508, 600]},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_ids_outside_the_vocabulary_are_refused(folder: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="outside the vocabulary of 512"):
        load(folder, **{**IDS, **wrong})


def test_block_length_must_be_positive(folder: Path) -> None:
    with pytest.raises(InputError, match="block_length"):
        load(folder, **IDS, block_length=0)


def test_other_architectures_must_name_their_block_length(tmp_path: Path) -> None:
    model = tiny_qwen()
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no block length") as error:
        load(tmp_path, mask_token_id=1, eos_token_id=2)
    assert error.value.hint == (
        "pass `block_length`; an autoregressive model gets one by `dmax convert`, "
        "or is decoded as it is with `block_length` 1 and `shift` true"
    )
    assert (
        load(tmp_path, mask_token_id=1, eos_token_id=2, block_length=8).special_ids.block_length
        == 8
    )


def tiny_qwen() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes: dict[str, Any] = dict(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=32, num_hidden_layers=1, **sizes))


# ---- names and files -----------------------------------------------------------------------------


def test_bundled_names_lead_to_folders_of_the_package() -> None:
    assert tiny.bundled("tiny-dmax") == Path(tiny.__file__).parent / "tiny-dmax"
    assert tiny.bundled("tiny") is None


def test_bundled_checkpoints_are_found_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmax.hub.bundled", lambda name: folder if name == "tiny-dmax" else None)
    assert load("tiny-dmax", **IDS).path == str(folder)


def test_hub_repositories_are_downloaded_then_read_as_folders(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **_: {"someone/model": folder}[name]
    )
    assert load("someone/model", **IDS).path == str(folder)


@pytest.mark.parametrize("name", ["someone/model", "/no/such/folder", "./nothing", "tiny-typo"])
def test_unreachable_names_get_one_clear_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"neither bundled \(tiny-base, tiny-dmax\), nor a folder, nor reachable"
    ):
        load(name)


def test_folders_without_a_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"model_type": "no-such-type"}', '{"model_type": "llada2_moe"']
)
def test_unusable_configurations_get_one_clear_sentence(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json is damaged|is not a usable checkpoint"):
        load(folder, **IDS)


def test_contradictory_configurations_get_one_clear_sentence(folder: Path) -> None:
    edit(folder / "config.json", score_function="softmax")
    with pytest.raises(InputError, match="score_function"):
        load(folder, **IDS)


@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"]
)
@pytest.mark.parametrize("content", ["{", "[]", "null", "\xff"])
def test_damaged_files_of_settings_are_named(folder: Path, name: str, content: str) -> None:
    add_tokenizer(folder)
    (folder / name).write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=f"{re.escape(name)} is damaged"):
        load(folder, **IDS)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "generation_config.json",
            {"eos_token_id": "x"},
            "`eos_token_id` must be a token id, got 'x'",
        ),
        (
            "generation_config.json",
            {"eos_token_id": [508, {}]},
            "`eos_token_id` must be a token id, got {}",
        ),
        (
            "generation_config.json",
            {"eos_token_id": True},
            "`eos_token_id` must be a token id, got True",
        ),
        (
            "generation_config.json",
            {"max_new_tokens": -1},
            "generation_config.json is not usable: `max_new_tokens`",
        ),
        ("config.json", {"mask_token_id": 1.5}, "`mask_token_id` must be a token id, got 1.5"),
        (
            "config.json",
            {"block_length": "x"},
            "`block_length` must be a whole number between 1 and 4096, got 'x'",
        ),
        (
            "config.json",
            {"vocab_size": "a"},
            "is not a usable checkpoint: `vocab_size` must be int, got 'a'",
        ),
        (
            "config.json",
            {"rms_norm_eps": "a"},
            "is not a usable checkpoint: `rms_norm_eps` must be float, got 'a'",
        ),
    ],
)
def test_settings_of_a_wrong_type_are_named(
    folder: Path, name: str, change: dict[str, Any], message: str
) -> None:
    ids = {} if "eos_token_id" in change or "mask_token_id" in change else IDS
    edit(folder / "config.json", mask_token_id=511)
    edit(folder / name, **change)
    with pytest.raises(InputError) as error:
        load(folder, **ids)
    assert message in error.value.message and "\n" not in error.value.message


def test_other_architectures_name_the_field_of_a_wrong_type_too(tmp_path: Path) -> None:
    tiny_qwen().save_pretrained(tmp_path)
    edit(tmp_path / "config.json", vocab_size="a")
    with pytest.raises(InputError, match=r"not a usable checkpoint: .*vocab_size.*'a'"):
        load(tmp_path, mask_token_id=1, eos_token_id=2, block_length=8)


@pytest.mark.parametrize("name", [3, True, None, [], {}])
def test_what_is_no_name_is_refused(folder: Path, name: Any) -> None:
    with pytest.raises(InputError, match="a model must be a name or a folder, got"):
        load(name)
    if name is not None:
        for option in ("attn_implementation", "experts_implementation"):
            with pytest.raises(InputError, match=f"`{option}` must be a name, got"):
                load(folder, **IDS, **{option: name})
        with pytest.raises(InputError, match="unknown format"):
            load(folder, **IDS, quantization=name)


def test_an_empty_name_and_one_too_long_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="the name of the model is empty"):
        load("")
    with pytest.raises(InputError, match="neither bundled"):
        load("x" * 5000)


def test_folders_without_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        load(folder, **IDS)


def test_damaged_weights_are_refused_for_our_and_other_architectures(
    folder: Path, tmp_path: Path
) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match="truncated"):
        load(folder, **IDS)
    model, other = tiny_qwen(), tmp_path / "other"
    ids: dict[str, Any] = {"mask_token_id": 1, "eos_token_id": 2, "block_length": 8}
    state = model.state_dict()
    del state["model.norm.weight"]
    model.save_pretrained(other, state_dict=state)
    with pytest.raises(InputError, match=r"lacks 1 weights.*model\.norm\.weight"):
        load(other, **ids)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match="truncated"):
        load(other, **ids)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"intermediate_size": 20}, r"`model\.layers\.0\.mlp\..*` has the shape .* needs \["),
        ({"hidden_act": "nonesuch"}, "names 'nonesuch', which is unknown"),
    ],
)
def test_a_config_of_another_model_is_named(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    tiny_qwen().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=said):
        load(tmp_path, mask_token_id=1, eos_token_id=2, block_length=8)


def test_remote_code_is_never_touched(folder: Path) -> None:
    marker = folder / "ran"
    code = f"open({str(marker)!r}, 'w').close()\n"
    for name in ("configuration_llada2_moe", "modeling_llada2_moe"):
        (folder / f"{name}.py").write_text(code)
    auto_map = {
        "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
    }
    edit(folder / "config.json", auto_map=auto_map)
    assert type(load(folder, **IDS).model).__module__ == "dmax.models.llada2_moe.modeling"
    assert not marker.exists()


def test_implementations_and_dtype_are_passed_on(folder: Path) -> None:
    found = load(
        folder,
        **IDS,
        dtype=torch.bfloat16,
        attn_implementation="eager",
        experts_implementation="batched_mm",
    )
    assert found.model.dtype == torch.bfloat16
    assert found.model.config._attn_implementation == "eager"
    assert found.model.config._experts_implementation == "batched_mm"
    with pytest.raises(InputError, match="cannot be loaded"):
        load(folder, **IDS, attn_implementation="no-such-attention")


# ---- decoding ------------------------------------------------------------------------------------


def test_bundled_checkpoints_name_their_decoding() -> None:
    assert load("tiny-base").decoding == "threshold"
    assert load("tiny-dmax").decoding == "spd"


def test_a_checkpoint_that_names_no_decoding_has_none(folder: Path) -> None:
    assert load(folder, **IDS).decoding is None


@pytest.mark.parametrize("name", ["DMax-16B", "DMax-Math-16B", "DMax-Coder-16B"])
def test_published_models_are_known_by_their_hub_id_and_as_a_folder(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: folder)
    assert load(f"Zigeng/{name}", **IDS).decoding == "spd"
    assert load(f"someone/{name}", **IDS).decoding is None
    copy = folder.rename(folder.with_name(name))
    assert load(copy, **IDS).decoding == "spd"
    edit(copy / "config.json", decoding_strategy="threshold")
    assert load(copy, **IDS).decoding == "threshold"


@pytest.mark.parametrize("value", ["spdd", "", 3, ["spd"], {}])
def test_a_decoding_that_is_unknown_gets_one_clear_sentence(folder: Path, value: Any) -> None:
    edit(folder / "config.json", decoding_strategy=value)
    with pytest.raises(InputError) as error:
        load(folder, **IDS)
    assert (
        error.value.message == f"{folder} names the decoding strategy {value!r}, which is unknown"
    )
    assert error.value.hint


def test_a_saved_checkpoint_names_its_decoding(folder: Path, tmp_path: Path) -> None:
    model = load(folder, **IDS).model
    target = tmp_path / "saved"
    save_checkpoint(model, None, target, SAVED, decoding="spd")
    again = load(target)
    assert again.decoding == "spd"
    save_checkpoint(again.model, None, target, SAVED)
    assert load(target).decoding == "spd"
    save_checkpoint(again.model, None, target, SAVED, decoding="threshold")
    assert load(target).decoding == "threshold"
    with pytest.raises(InputError, match="decoding strategy 'spdd', which is unknown"):
        save_checkpoint(model, None, target, SAVED, decoding="spdd")


# ---- saving --------------------------------------------------------------------------------------

SAVED = SpecialIds(mask_token_id=511, eos_token_ids=(508, 509), pad_token_id=508, block_length=16)


def test_a_saved_checkpoint_names_its_own_ids(folder: Path, tmp_path: Path) -> None:
    tokenizer, target = add_tokenizer(folder, eos_token="<eos>"), tmp_path / "deep" / "saved"
    model = load(folder, **IDS).model
    save_checkpoint(model, tokenizer, target, SAVED, extra={"objective": "oput"})
    found = load(target)
    assert found.special_ids == SAVED
    assert found.tokenizer is not None and found.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert json.loads((target / "dmax.json").read_text()) == {"objective": "oput"}
    assert AutoConfig.from_pretrained(target).architectures == ["LLaDA2MoeModelLM"]
    assert model.config.block_length is None  # the caller's model is left as it was
    before, after = model.state_dict(), found.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [entry.name for entry in target.parent.iterdir()] == ["saved"]


def test_saving_replaces_a_checkpoint_whole(folder: Path, tmp_path: Path) -> None:
    model, target = load(folder, **IDS).model, tmp_path / "saved"
    target.mkdir()  # empty: as good as absent
    save_checkpoint(model, None, target, SAVED, extra={"step": 1})
    save_checkpoint(model, None, target, replace(SAVED, block_length=4))
    assert load(target).special_ids.block_length == 4
    assert json.loads((target / "dmax.json").read_text()) == {}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint", "saved"]


def test_saving_never_replaces_anything_else(folder: Path, tmp_path: Path) -> None:
    model, target = load(folder, **IDS).model, tmp_path / "thesis"
    target.mkdir()
    (target / "chapter1.tex").write_text("years of work")
    for place in (target, target / "chapter1.tex"):
        with pytest.raises(InputError, match="exists and was not written by dmax"):
            save_checkpoint(model, None, place, SAVED)
    (target / "config.json").write_text("{}")  # other programs have a file of this name too
    with pytest.raises(InputError, match="exists and was not written by dmax"):
        save_checkpoint(model, None, target, SAVED)
    assert (target / "chapter1.tex").read_text() == "years of work"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(InputError, match="exists and was not written by dmax"):
        save_checkpoint(model, None, folder, SAVED)  # a checkpoint, and somebody else's
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_an_interrupted_save_leaves_the_old_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, target = load(folder, **IDS).model, tmp_path / "saved"
    save_checkpoint(model, None, target, SAVED)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    for failure, expected in (
        (OSError(28, "No space left on device"), InputError),
        (KeyboardInterrupt(), None),
    ):

        def fail(*_: Any, error: BaseException = failure, **__: Any) -> None:
            raise error

        monkeypatch.setattr(type(model.config), "save_pretrained", fail)
        with pytest.raises(expected or type(failure)):
            save_checkpoint(model, None, target, SAVED)
        assert {file.name: file.read_bytes() for file in target.iterdir()} == before
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint", "saved"]


def test_a_full_disk_leaves_the_old_checkpoint_and_is_said_in_one_sentence(
    folder: Path, tmp_path: Path, limit_files: Callable[[int], None]
) -> None:
    model = load(folder, **IDS).model
    target = tmp_path / "saved"
    save_checkpoint(model, None, target, SAVED)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    assert len(before["model.safetensors"]) > 10_000
    limit_files(10_000)
    with pytest.raises(InputError) as error:
        save_checkpoint(model, None, target, SAVED)
    limit_files(-1)
    assert error.value.message.startswith(f"cannot write the checkpoint {target}: ")
    assert "File too large" in error.value.message and "\n" not in error.value.message
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint", "saved"]


def test_unwritable_places_get_one_clear_sentence(folder: Path, tmp_path: Path) -> None:
    model, blocked = load(folder, **IDS).model, tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="cannot write the checkpoint"):
        save_checkpoint(model, None, blocked / "inside", SAVED)
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(InputError, match="cannot write the checkpoint"):
            save_checkpoint(model, None, tmp_path / "saved", SAVED)
        tmp_path.chmod(0o700)
