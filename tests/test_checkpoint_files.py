"""Folders of strangers: damaged, huge, endless, or made to run code. One sentence, and at once."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import GOLDEN, IDS, add_tokenizer, edit, load, tiny_qwen

from dmax.checkpoint_files import CODE, without_code
from dmax.errors import InputError

QWEN_IDS: dict[str, Any] = {"mask_token_id": 1, "eos_token_id": 2, "block_length": 8}
NESTED = '{"a":' * 200_000 + "1" + "}" * 200_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of our own architecture, with a tokenizer."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / name, folder / name)
    add_tokenizer(folder)
    return folder


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """A checkpoint of a dense decoder of transformers."""
    folder = tmp_path / "qwen"
    tiny_qwen().save_pretrained(folder)
    return folder


def refused(folder: Path, **ids: Any) -> str:
    """The sentence that a folder is refused with, before anything is built."""
    with pytest.raises(InputError) as error:
        load(folder, **(ids or IDS))
    message = error.value.message
    assert "\n" not in message
    assert len(message) < 1000
    return message


# ---- files ---------------------------------------------------------------------------------------

FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "model.safetensors",
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", ["", "{", "[]", "null", "5", NESTED, "\xff\xfe", "\x00" * 99])
def test_damaged_files_are_refused(folder: Path, name: str, content: str) -> None:
    (folder / name).write_bytes(content.encode("latin-1"))
    message = refused(folder)
    assert name in message or "tokenizer" in message


@pytest.mark.parametrize("name", [*FILES, "chat_template.jinja", "added_tokens.json"])
@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        os.mkdir,
        lambda path: os.symlink("/dev/zero", path),
        lambda path: os.symlink(path, path),
        lambda path: os.symlink("/no/such/file", path),
    ],
    ids=["pipe", "folder", "device", "loop", "dangling"],
)
def test_what_is_no_file_is_never_opened(
    folder: Path, name: str, make: Callable[[Path], None]
) -> None:
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    message = refused(folder)
    assert "config.json" in message or f"{name} is not a file" in message


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_files_of_gigabytes_are_not_read(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    with (folder / name).open("wb") as file:
        file.truncate(2**33)  # no block of it is on the disk
    assert "bytes" in refused(folder)


def test_names_of_files_are_cut(folder: Path) -> None:
    long = folder.with_name("x" * 250)
    folder.rename(long)
    (long / "config.json").write_text("{")
    assert len(refused(long)) < 400


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": None},
        {"model_type": 3},
        {"model_type": ["llada2_moe"]},
        {"model_type": "llada2_mo"},
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": 10**400},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": None},
        {"num_hidden_layers": "2"},
        {"num_hidden_layers": [2]},
        {"num_hidden_layers": True},
        {"hidden_size": 10**9},
        {"hidden_size": 0},
        {"vocab_size": 10**12},
        {"num_experts": 10**6},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"n_group": -1},
        {"head_dim": 10**8},
        {"head_dim": 0},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": -1.0},
        {"rope_theta": float("inf")},
        {"rope_theta": 0},
        {"rope_theta": "a"},
        {"rope_parameters": {"rope_type": "no-such", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
        {"rope_parameters": []},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": -1.0}},
        {"rope_scaling": {"type": "linear", "factor": "x"}},
        {"rope_scaling": 5},
        {"partial_rotary_factor": 7.0},
        {"hidden_act": "no-such"},
        {"hidden_act": 3},
        {"hidden_act": None},
        {"max_position_embeddings": 0},
        {"max_position_embeddings": 2**40},
        {"dtype": "float99"},
        {"dtype": {}},
        {"tie_word_embeddings": "yes"},
        {"use_qkv_bias": 1},
        {"norm_topk_prob": None},
        {"first_k_dense_replace": -3},
        {"initializer_range": "a"},
        {"layer_types": 5},
        {"quantization_config": {"quant_method": "fp8"}},
        {"quantization_config": {}},
    ],
    ids=lambda change: str(change)[:60],
)
def test_settings_that_no_model_has_are_refused(folder: Path, change: dict[str, Any]) -> None:
    edit(folder / "config.json", **change)
    assert "checkpoint" in refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 0},
        {"hidden_size": 10**9},
        {"hidden_size": 1600},
        {"vocab_size": 10**9},
        {"intermediate_size": 10**9},
        {"num_attention_heads": 10**9},
        {"num_attention_heads": 0},
        {"head_dim": 1000},
        {"rms_norm_eps": float("nan")},
        {"rope_parameters": {"rope_type": "no-such", "rope_theta": 1e4}},
        {"rope_parameters": 3},
        {"hidden_act": "no-such"},
        {"layer_types": ["no-such"]},
        {"layer_types": 5},
        {"dtype": "float99"},
    ],
    ids=lambda change: str(change)[:60],
)
def test_settings_of_other_architectures_are_refused_too(
    qwen: Path, change: dict[str, Any]
) -> None:
    edit(qwen / "config.json", **change)
    refused(qwen, **QWEN_IDS)


def test_an_embedding_that_is_also_the_head_counts_as_weights(qwen: Path) -> None:
    num_weights = (qwen / "model.safetensors").stat().st_size // 4
    edit(qwen / "config.json", tie_word_embeddings=True, vocab_size=num_weights // 2)
    assert "describes a model of at least" in refused(qwen, **QWEN_IDS)


def test_a_model_of_text_and_images_is_refused(tmp_path: Path) -> None:
    parts = {"text_config": {"vocab_size": 40}, "vision_config": {"hidden_size": 16}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", **parts}))
    assert "holds a gemma3, which is more than a text decoder" in refused(tmp_path)


def test_a_million_labels_are_not_made(folder: Path) -> None:
    edit(folder / "config.json", num_labels=2_000_000_000, id2label={"0": "a"})
    assert len(load(folder, **IDS).model.config.id2label) < 10


@pytest.mark.parametrize(
    "change",
    [
        {"eos_token_id": "x"},
        {"eos_token_id": {"a": 1}},
        {"eos_token_id": 10**9},
        {"max_new_tokens": -1},
        {"temperature": "hot"},
        {"cache_implementation": 5},
    ],
    ids=str,
)
def test_generation_configs_that_no_model_has_are_refused(
    folder: Path, change: dict[str, Any]
) -> None:
    edit(folder / "generation_config.json", **change)
    refused(folder, mask_token_id=511)


@pytest.mark.parametrize(
    "change",
    [
        {"model_max_length": "x", "tokenizer_class": 5},
        {"tokenizer_class": ["a"]},
        {"extra_special_tokens": 5},
        {"added_tokens_decoder": {"a": 5}},
        {"added_tokens_decoder": []},
        {"eos_token": 5},
        {"eos_token": {"content": []}},
        {"padding_side": "up"},
    ],
    ids=str,
)
def test_tokenizers_that_are_none_are_refused(folder: Path, change: dict[str, Any]) -> None:
    edit(folder / "tokenizer_config.json", **change)
    assert "tokenizer" in refused(folder)


# ---- weights -------------------------------------------------------------------------------------


def header(record: Any, data: bytes = b"") -> bytes:
    text = record if isinstance(record, bytes) else json.dumps(record).encode()
    return struct.pack("<Q", len(text)) + text + data


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 2**40) + b"{}",
        header(NESTED.encode()),
        header(b"\xff\xfe"),
        header([]),
        header({}),
        header({"a": TENSOR}),
        header({"a": TENSOR, "b": TENSOR}, b"\x00" * 4),
        header({"a": {**TENSOR, "data_offsets": [4, 0]}}, b"\x00" * 4),
        header({"a": {**TENSOR, "shape": [2**62, 2**62]}}, b"\x00" * 4),
        header({"a": {**TENSOR, "shape": [-1]}}, b"\x00" * 4),
        header({"a": {**TENSOR, "dtype": "F99"}}, b"\x00" * 4),
        header({"a": TENSOR}, b"\x00" * 8),
    ],
)
def test_headers_of_weights_are_checked(folder: Path, qwen: Path, content: bytes) -> None:
    for each, ids in ((folder, IDS), (qwen, QWEN_IDS)):
        (each / "model.safetensors").write_bytes(content)
        refused(each, **ids)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../checkpoint/model-1.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "no-such.safetensors"},
        {"a": 5},
        {"a": None},
        {"a": ["model-1.safetensors"]},
        ["a"],
        5,
        {},
    ],
    ids=str,
)
def test_an_index_names_files_of_its_folder(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    edit(folder / "model.safetensors.index.json", weight_map=weight_map)
    refused(folder)


def test_quantised_codes_are_no_weights_of_other_architectures(qwen: Path) -> None:
    tensors = load_file(qwen / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for dtype in (torch.int8, torch.float8_e4m3fn):
        save_file({**tensors, name: tensors[name].to(dtype)}, qwen / "model.safetensors")
        assert name in refused(qwen, **QWEN_IDS)


# ---- no remote code ------------------------------------------------------------------------------

KERNEL = "kernels-community/flash-attn"
HOSTILE = {
    "auto_map": {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model",
        "AutoTokenizer": ["evil.Tokenizer", None],
    },
    "attn_implementation": f"{KERNEL}:forward",
    "_attn_implementation": KERNEL,
    "_attn_implementation_internal": KERNEL,
    "_attn_implementation_autoset": True,
    "experts_implementation": KERNEL,
    "_experts_implementation": KERNEL,
    "custom_pipelines": {"text-generation": {"impl": "evil.Pipeline", "pt": ["Model"]}},
    "custom_generate": "evil/repo",
    "trust_remote_code": True,
    "use_kernels": True,
    "kernel_config": {"RMSNorm": KERNEL},
    "transformers_weights": "evil.bin",
    "configuration_files": ["config.evil.json"],
    "name_or_path": "evil/repo",
    "_name_or_path": "evil/repo",
}


@pytest.fixture
def tripwire(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What loading tried: the network, kernels of the hub, or modules of a checkpoint."""
    import transformers.dynamic_module_utils as dynamic
    import transformers.integrations.hub_kernels as kernels

    tried: list[str] = []

    def trip(name: str) -> Callable[..., None]:
        def fail(*args: Any, **_: Any) -> None:
            tried.append(f"{name}{args[:2]}")
            raise OSError("tripwire")

        return fail

    monkeypatch.setattr("socket.socket.connect", trip("connect"))
    monkeypatch.setattr("socket.getaddrinfo", trip("getaddrinfo"))
    monkeypatch.setattr("torch.load", trip("torch.load"))
    for name in ("get_class_from_dynamic_module", "get_class_in_module", "get_cached_module_file"):
        monkeypatch.setattr(dynamic, name, trip(name))
    for name in [name for name in vars(kernels) if "kernel" in name and name.startswith("get_")]:
        monkeypatch.setattr(kernels, name, trip(name))
    return tried


def plant(folder: Path) -> Path:
    """Code in every place where some library has looked for it; its traces are in the file."""
    trace = folder / "ran"
    code = f"open({str(trace)!r}, 'a').write(__name__)\n"
    (folder / "custom_generate").mkdir()
    for name in ("evil.py", "__init__.py", "modeling_llada2_moe.py", "custom_generate/generate.py"):
        (folder / name).write_text(code)
    torch.save({"a": torch.zeros(1)}, folder / "evil.bin")
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    edit(folder / "config.evil.json", auto_map=HOSTILE["auto_map"])
    return trace


@pytest.mark.parametrize("key", [*HOSTILE, None])
def test_no_setting_makes_code_load(
    folder: Path, qwen: Path, key: str | None, tripwire: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = {key: HOSTILE[key]} if key else HOSTILE
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for each, ids in ((folder, IDS), (qwen, QWEN_IDS)):
        trace = plant(each)
        modules = set(sys.modules)
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            if (each / name).exists():
                edit(each / name, **hostile)
        found = load(each, **ids)
        assert found.model.config._attn_implementation == "sdpa"
        assert not trace.exists()
        assert not [name for name in set(sys.modules) - modules if "evil" in name]
    assert tripwire == []


@pytest.mark.parametrize("kind", ["awq", "gptq", "mxfp4", "fp8", "bitsandbytes", "torchao", "x"])
def test_no_quantiser_is_loaded(qwen: Path, tripwire: list[str], kind: str) -> None:
    edit(qwen / "config.json", quantization_config={"quant_method": kind, "load_in_4bit": True})
    assert "quantised weights" in refused(qwen, **QWEN_IDS)
    assert tripwire == []


def test_an_adapter_is_no_checkpoint_without_its_base(folder: Path, tripwire: list[str]) -> None:
    edit(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path="/evil/repo")
    assert "the base model of the adapters" in refused(folder)
    assert tripwire == []


def test_pickled_weights_are_never_opened(folder: Path, qwen: Path, tripwire: list[str]) -> None:
    for each, ids in ((folder, IDS), (qwen, QWEN_IDS)):
        (each / "model.safetensors").unlink()
        torch.save({"a": torch.zeros(1)}, each / "pytorch_model.bin")
        assert "no safetensors files" in refused(each, **ids)
    assert tripwire == []


@pytest.mark.parametrize("name", [KERNEL, f"{KERNEL}:forward", "paged|sdpa", "no-such"])
def test_no_kernel_of_the_hub_is_loaded_when_asked_for(
    folder: Path, qwen: Path, tripwire: list[str], name: str
) -> None:
    for each, ids in ((folder, IDS), (qwen, QWEN_IDS)):
        refused(each, **ids, attn_implementation=name)
        refused(each, **ids, experts_implementation=name)
    assert tripwire == []


def test_nothing_that_names_code_is_left_in_a_configuration() -> None:
    nested = {"text_config": {**HOSTILE, "hidden_size": 5}, "hidden_size": 4, **HOSTILE}
    harmless = {"custom_generate": "evil/repo"}  # read by `generate` of transformers alone
    assert without_code(dict.fromkeys(CODE, 1)) == {}
    assert without_code({"return_dict": False, "hidden_size": 4}) == {"hidden_size": 4}
    assert without_code(nested) == {
        "hidden_size": 4,
        "text_config": {"hidden_size": 5, **harmless},
        **harmless,
    }
