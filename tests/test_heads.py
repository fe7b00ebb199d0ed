"""Heads: their equations on numbers worked out by hand, and what is said of other files."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmax.baselines.heads import (
    KINDS,
    Head,
    Kind,
    dependency_logits,
    filter_logits,
    load_head,
    save_head,
    shapes,
    weights_sample,
)
from dmax.checkpoint import load_checkpoint
from dmax.errors import InputError
from dmax.llm import LLM
from dmax.params import DecodingParams
from dmax.tiny import BUNDLED, bundled_head


def test_the_filter_on_numbers_worked_out_by_hand() -> None:
    tensors = {
        "inner.weight": torch.tensor([[1.0, 0.0], [-1.0, 1.0]]),
        "inner.bias": torch.tensor([0.0, 0.25]),
        "outer.weight": torch.tensor([[2.0, 4.0], [0.0, -4.0]]),
        "outer.bias": torch.tensor([-1.0, 3.0]),
    }
    # inner: (0.5, -0.5 + 0.75 + 0.25) = (0.5, 0.5), and (0.9, -0.9 + 0.1 + 0.25 < 0) = (0.9, 0)
    logits = filter_logits(tensors, torch.tensor([[0.5, 0.75], [0.9, 0.1]]))
    torch.testing.assert_close(logits, torch.tensor([[2.0, 1.0], [0.8, 3.0]]))
    # A block of one position: the other one counts as 0. (0.2, -0.2 + 0.25) gives 0.4 + 0.2 - 1.
    torch.testing.assert_close(
        filter_logits(tensors, torch.tensor([[0.2]])), torch.tensor([[-0.4]])
    )


def test_the_dependency_on_numbers_worked_out_by_hand() -> None:
    tensors = {
        "query": torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]]),
        "key": torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]),
        "distance": torch.tensor([-20.0, -10.0, 0.0, 10.0, 20.0]),  # j - i = -2 … 2
    }
    hidden = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    # queries (1, 0), (1, 2), keys (3, 0), (3, 1); products over √4, and 10 (j - i)
    expected = [[3 / 2, 3 / 2 + 10], [3 / 2 - 10, 5 / 2]]
    torch.testing.assert_close(dependency_logits(tensors, hidden), torch.tensor([expected]))
    torch.testing.assert_close(
        dependency_logits(tensors, hidden.bfloat16()), torch.tensor([expected])
    )


@pytest.fixture(params=KINDS)
def head(request: pytest.FixtureRequest) -> Head:
    tensors = {name: torch.rand(shape) for name, shape in shapes(request.param, 4, 6, 3).items()}
    return Head(request.param, "abc", 4, 6, 10, tensors)


def test_a_head_comes_back_from_its_file(head: Head, tmp_path: Path) -> None:
    file = tmp_path / "folder" / f"{head.kind}.safetensors"
    save_head(head, file)
    back = load_head(str(file), head.kind)
    assert back == head and back.digest == head.digest
    assert all(torch.equal(back.tensors[name], value) for name, value in head.tensors.items())
    assert load_head(str(file.parent), head.kind) is back  # by its folder, and read once
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_changed_file_is_read_again(head: Head, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_head(head, file)
    first = load_head(str(file), head.kind)
    doubled = {name: 2 * value for name, value in head.tensors.items()}
    save_head(Head(head.kind, "abc", 4, 6, 20, doubled), file)
    os.utime(file, ns=(0, 7))
    assert load_head(str(file), head.kind).digest != first.digest


def test_two_heads_are_told_apart_where_settings_are_written_down(head: Head) -> None:
    other = Head(
        head.kind, "abc", 4, 6, 10, {name: value + 1 for name, value in head.tensors.items()}
    )
    assert repr(other) != repr(head) and head.digest in repr(head)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["", None, 3])
def test_no_head_is_one_error_that_says_how_to_get_one(kind: Kind, name: Any) -> None:
    with pytest.raises(InputError, match=f"strategy `{kind}` needs the option `head`") as caught:
        load_head(name, kind)
    assert f"recipes/tiny_{kind}.yaml" in (caught.value.hint or "")


def damage(file: Path, what: str) -> None:
    tensors = load_file(file)
    about = {"kind": "learn2pd", "model": "a", "block_length": "4", "hidden_size": "6"}
    about["steps"] = "1"
    match what:
        case "bytes":
            file.write_bytes(b"nonsense")
            return
        case "cut off":
            file.write_bytes(file.read_bytes()[:-5])
            return
        case "shape":
            tensors["inner.bias"] = torch.zeros(5)
        case "nan":
            tensors["outer.bias"][0] = math.nan
        case "tensor":
            del tensors["outer.bias"]
        case "whole numbers":
            tensors["outer.bias"] = tensors["outer.bias"].long()
        case "sample":
            tensors["model.sample"] = torch.zeros(3, dtype=torch.int32)
        case "kind":
            about["kind"] = "demask"
        case "number":
            about["block_length"] = "four"
        case "metadata":
            about = {}
    save_file(tensors, file, about)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("bytes", ""),
        ("cut off", ""),
        ("shape", "`inner.bias` must be [4] finite numbers, got [5]"),
        ("nan", "`outer.bias` must be [4] finite numbers"),
        ("tensor", "`outer.bias` is missing"),
        ("whole numbers", "`outer.bias` must hold floats, got torch.int64"),
        ("sample", "`model.sample` must hold floats, got torch.int32"),
        ("kind", "it belongs to strategy `demask`"),
        ("number", "four"),
        ("metadata", "`kind` is missing"),
    ],
)
def test_an_unsound_file_is_one_error_that_says_how_to_get_a_sound_one(
    tmp_path: Path, what: str, reason: str
) -> None:
    file = tmp_path / "head.safetensors"
    tensors = {name: torch.rand(shape) for name, shape in shapes("learn2pd", 4, 6, 0).items()}
    save_head(Head("learn2pd", "a", 4, 6, 1, tensors), file)
    damage(file, what)
    with pytest.raises(InputError) as caught:
        load_head(str(file), "learn2pd")
    assert f"{file} is not a sound head of strategy `learn2pd`" in caught.value.message
    assert reason in caught.value.message
    assert "recipes/tiny_learn2pd.yaml" in (caught.value.hint or "")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn])
def test_a_head_of_another_precision_is_read_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    file = tmp_path / "head.safetensors"
    tensors = {name: torch.rand(shape) for name, shape in shapes("learn2pd", 4, 6, 0).items()}
    save_head(Head("learn2pd", "a", 4, 6, 1, tensors, torch.rand(3)), file)
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, about)
    head = load_head(str(file), "learn2pd")
    assert head.sample is not None and head.sample.dtype == torch.float32
    for name, tensor in head.tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensors[name].to(dtype).float())


def test_a_query_without_a_dimension_is_no_head(tmp_path: Path) -> None:
    file = tmp_path / "head.safetensors"
    about = {"kind": "demask", "model": "a", "block_length": "4", "hidden_size": "6", "steps": "1"}
    save_file({"query": torch.tensor(1.0)}, file, about)
    with pytest.raises(InputError, match="is not a sound head of strategy `demask`"):
        load_head(str(file), "demask")


def test_a_missing_file(tmp_path: Path) -> None:
    for name in (tmp_path / "no.safetensors", tmp_path):  # a folder without one
        with pytest.raises(InputError, match="strategy `demask` has no head"):
            load_head(str(name), "demask")


def test_a_place_that_cannot_be_written(head: Head, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        save_head(head, tmp_path / "file" / "head.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_with_dmax_is_small_and_belongs_to_a_bundled_model(kind: Kind) -> None:
    shipped = [name for name in BUNDLED if bundled_head(name, kind).is_file()]
    assert "tiny-base" in shipped
    for name in shipped:
        assert load_head(name, kind).block_length == 32
        assert bundled_head(name, kind).stat().st_size < 200_000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_head_knows_its_model_in_every_dtype(kind: Kind, dtype: str) -> None:
    head = load_head("tiny-base", kind)
    own, other = (
        load_checkpoint(name, dtype=getattr(torch, dtype), device="cpu").model
        for name in ("tiny-base", "tiny-dmax")
    )
    head.check_weights(own.named_parameters(), "head `a`")
    for weights in (list(other.named_parameters()), [("a", torch.zeros(3))]):
        with pytest.raises(InputError, match="the head `a` was trained on another model") as error:
            head.check_weights(weights, "head `a`")
        assert error.value.hint is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_of_another_model_is_refused_before_anything_is_decoded(kind: Kind) -> None:
    llm = LLM("tiny-dmax", dtype="float32", device="cpu")
    params = DecodingParams(kind, options={"head": "tiny-base"})
    with pytest.raises(InputError, match="`tiny-base` was trained on another model"):
        llm.request(0, "Hi", params)
    quantized = LLM("tiny-base", dtype="bfloat16", device="cpu", quantization="int8")
    assert quantized.request(0, "Hi", params).strategy.name == kind


def test_a_sample_comes_back_from_its_file(head: Head, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    weights = [("a", torch.arange(40.0)), ("mlp.experts.up", torch.ones(3)), ("b", torch.ones(2))]
    sample = weights_sample(weights)
    assert sample.tolist() == [*range(16), 1, 1]
    save_head(Head(head.kind, "abc", 4, 6, 10, head.tensors, sample), file)
    back = load_head(str(file), head.kind)
    assert back.sample is not None and torch.equal(back.sample, sample)
    assert back.digest == head.digest


@pytest.mark.parametrize("name", ["x" * 10_000, "a\x00b", "~nobody-of-this-name/a", "/dev/zero"])
def test_odd_names_of_heads_get_one_short_sentence(name: str) -> None:
    with pytest.raises(InputError, match="cannot be read") as error:
        load_head(name, "demask")
    assert len(error.value.message) < 600
    assert "\x00" not in error.value.message
