"""A small checkpoint with heads of its own, which a case loads and decodes in milliseconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import skip_without_limits
from test_llm import CONFIG, build

from dmax import LLM
from dmax.baselines.heads import KINDS, Head, save_head, shapes


@pytest.fixture(scope="session", autouse=True)
def _limits() -> None:
    skip_without_limits()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory, True)


@pytest.fixture(scope="session")
def llm(checkpoint: Path) -> LLM:
    return LLM(str(checkpoint), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def own_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random head of each kind that fits the checkpoint."""
    folder = tmp_path_factory.mktemp("heads")
    generator = torch.Generator().manual_seed(0)
    length = int(CONFIG["block_length"])
    hidden = int(CONFIG["hidden_size"])
    for kind in KINDS:
        tensors = {
            name: torch.randn(shape, generator=generator)
            for name, shape in shapes(kind, length, hidden, 3).items()
        }
        save_head(Head(kind, "0" * 16, length, hidden, 1, tensors), folder / f"{kind}.safetensors")
    return folder
