"""What every test relies on: no network, fixed seeds, one thread, properties that repeat."""

from __future__ import annotations

import os
import random

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it once
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and forked workers do not go together

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # small tensors gain nothing from more, and results do not depend on the machine's load
hypothesis.settings.register_profile("dmax", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("dmax")


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
