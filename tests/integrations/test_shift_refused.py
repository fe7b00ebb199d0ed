"""Other engines read predictions at their own positions, and refuse models that do not.

Neither engine is here: what their hooks import from them is made up.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from dmax.errors import InputError
from dmax.integrations.completer import EngineCompleter
from dmax.integrations.options import check_reading
from dmax.integrations.sglang.checkpoint import ARCHITECTURE, read_checkpoint
from dmax.models import LLaDA2MoeConfig
from dmax.tiny import bundled

MESSAGE = "a token is predicted by the position before it, and {} reads predictions at their own"


class SomeCompleter(EngineCompleter):
    """An engine that nobody starts."""

    engine = "Some"


def config(**changes: Any) -> LLaDA2MoeConfig:
    return LLaDA2MoeConfig(vocab_size=64, architectures=[ARCHITECTURE], **changes)


def test_only_a_config_that_says_so_is_refused() -> None:
    check_reading(config(), "vLLM")
    check_reading(config(shift=False), "vLLM")
    with pytest.raises(InputError, match=MESSAGE.format("vLLM")):
        check_reading(config(shift=True), "vLLM")
    with pytest.raises(InputError, match="`shift` must be true or false"):
        check_reading(config(shift="yes"), "vLLM")


def test_a_completer_refuses_it_before_its_engine_starts(tmp_path: Path) -> None:
    folder = tmp_path / "shifted"
    shutil.copytree(str(bundled("tiny-dmax")), folder)
    record = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(record | {"shift": True}), "utf-8")
    with pytest.raises(InputError, match=MESSAGE.format("Some")):
        SomeCompleter(str(folder))


@pytest.fixture
def vllm_config(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`dmax.integrations.vllm.config` over an engine of which nothing is real."""
    base = SimpleNamespace(VerifyAndUpdateConfig=object)
    made_up = {
        "vllm": MagicMock(),
        "vllm.config": MagicMock(),
        "vllm.config.compilation": MagicMock(),
        "vllm.config.diffusion": MagicMock(),
        "vllm.model_executor": MagicMock(),
        "vllm.model_executor.models": MagicMock(),
        "vllm.model_executor.models.config": base,
        "vllm.platforms": MagicMock(),
    }
    for name, module in made_up.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "dmax.integrations.vllm.config", raising=False)
    module = importlib.import_module("dmax.integrations.vllm.config")
    monkeypatch.delitem(sys.modules, "dmax.integrations.vllm.config")
    return module


def test_vllm_refuses_it_in_one_line(vllm_config: ModuleType) -> None:
    asked = SimpleNamespace(model_config=SimpleNamespace(hf_config=config(shift=True)))
    with pytest.raises(ValueError, match=MESSAGE.format("vLLM")) as error:
        vllm_config.BlockDiffusionConfig.verify_and_update_config(asked)
    assert not isinstance(error.value, InputError) and "\n" not in str(error.value)


def test_sglang_refuses_it_whatever_the_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(hf_config=config(shift=True), hf_generation_config=None)
    overrides = MagicMock()
    overrides.model_config_of = lambda _: model
    for name in ("sglang", "sglang.srt", "sglang.srt.arg_groups"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    monkeypatch.setitem(sys.modules, "sglang.srt.arg_groups.model_override_base", overrides)
    monkeypatch.setitem(sys.modules, "sglang.srt.arg_groups.overrides", MagicMock())
    for algorithm in ("DMax", "LowConfidence"):
        asked = SimpleNamespace(algorithm=algorithm, algorithm_config={}, mask_id=63)
        with pytest.raises(InputError, match=MESSAGE.format("SGLang")):
            read_checkpoint(asked, SimpleNamespace())
    assert read_checkpoint(None, SimpleNamespace()) is None
    model.hf_config.architectures = ["LlamaForCausalLM"]
    other = SimpleNamespace(algorithm="DMax")
    assert read_checkpoint(other, SimpleNamespace()) is other
