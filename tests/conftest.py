"""What every test relies on: no network, fixed seeds, one thread, properties that repeat."""

from __future__ import annotations

import atexit
import os
import random
import resource
import shutil
import signal
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it once
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="dmax-")  # read once, too
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and forked workers do not go together

import hypothesis
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # kernels run on CPU tensors; before triton is imported, which dmax does
    )

# A job in the background of a script ignores Ctrl-C, and so would the commands that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
torch.set_num_threads(
    1
)  # small tensors gain nothing from more, and results do not depend on the machine's load
hypothesis.settings.register_profile("dmax", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("dmax")


@pytest.fixture(scope="session")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random head of each kind, for blocks of 8 and hidden states of size 4."""
    from dmax.baselines.heads import KINDS, Head, save_head, shapes  # after what is set above

    folder, generator = tmp_path_factory.mktemp("heads"), torch.Generator().manual_seed(0)
    for kind in KINDS:
        tensors = {
            name: torch.randn(shape, generator=generator)
            for name, shape in shapes(kind, 8, 4, 3).items()
        }
        save_head(Head(kind, "0" * 16, 8, 4, 1, tensors), folder / f"{kind}.safetensors")
    return folder


@pytest.fixture(scope="session")
def needed(heads: Path) -> dict[str, dict[str, str]]:
    """The options that a strategy cannot do without, by its name."""
    return defaultdict(dict, {file.stem: {"head": str(heads)} for file in heads.iterdir()})


@pytest.fixture(scope="module", name="browser")
def browser_fixture() -> Iterator[Any]:
    """A headless Chromium."""
    from browser import chromium  # which skips tests where there is nothing to drive it

    with chromium() as browser:
        yield browser


@pytest.fixture
def limit_files() -> Iterator[Callable[[int], None]]:
    """A full disk: from a call on, no file may grow beyond so many bytes; -1 lifts the limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
