"""The published models, as the engine's tests take them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dmax.checkpoint import load_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module", params=["llada2_moe_a", "llada2_moe_c"])
def golden(request: pytest.FixtureRequest) -> tuple[str, Any, dict[str, Any]]:
    expected = json.loads((GOLDEN / request.param / "expected.json").read_text())
    checkpoint = load_checkpoint(
        GOLDEN / request.param,
        dtype=torch.float32,
        device="cpu",
        mask_token_id=expected["mask_token_id"],
        eos_token_id=expected["eos_token_id"],
        block_length=expected["block_length"],
    )
    return request.param, checkpoint, expected
