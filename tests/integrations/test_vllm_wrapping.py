"""Wrapped methods of a module that stands for vLLM's."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from dmax.integrations.vllm.wrapping import Method, is_served, wrap
from dmax.models.llada2_moe.configuration import LLaDA2MoeConfig

SOURCE = '''
class Engine:
    def ask(self, number):
        """Ask."""
        return number
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = f"fake_engine_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def doubled(original: Method) -> Method:
    def ask(self: object, number: int) -> int:
        return 2 * int(original(self, number))

    return ask


def test_a_method_is_replaced_when_its_module_is_imported(module: str) -> None:
    wrap(f"{module}:Engine", "ask", doubled)
    assert module not in sys.modules
    engine = __import__(module).Engine()
    assert engine.ask(3) == 6
    assert engine.ask.__doc__ == "Ask."


def test_a_module_that_is_there_is_changed_at_once(module: str) -> None:
    engine = __import__(module).Engine()
    wrap(f"{module}:Engine", "ask", doubled)
    assert engine.ask(3) == 6


def test_plugins_that_are_loaded_again_change_nothing_more(module: str) -> None:
    engine = __import__(module).Engine()
    for _ in range(3):
        wrap(f"{module}:Engine", "ask", doubled)
    assert engine.ask(3) == 6


def test_only_our_architecture_is_served() -> None:
    assert is_served(SimpleNamespace(hf_config=LLaDA2MoeConfig()))
    assert not is_served(SimpleNamespace(hf_config=LlamaConfig()))
