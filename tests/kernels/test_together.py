"""All kernels at once: a step of a published model as the engine takes it on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmax.blend import SoftTokens, embed_tokens
from dmax.checkpoint import load_checkpoint
from dmax.engine.rows import Row, Rows, Shape
from dmax.engine.runner import ModelRunner
from dmax.kernels import using

GOLDEN = Path(__file__).parents[1] / "golden" / "llada2_moe_c"


def step(device: torch.device, experts: str) -> tuple[Tensor, Tensor, Tensor]:
    """A step over a finished block and the open one after it, of two sequences.

    Returns the best tokens, their probabilities, and the hidden states.
    """
    ids: dict[str, Any] = {"mask_token_id": 319, "eos_token_id": 318, "block_length": 8}
    checkpoint = load_checkpoint(
        GOLDEN, dtype=torch.float32, device=device, experts_implementation=experts, **ids
    )
    runner = ModelRunner(checkpoint.model, 8, 2, 64, 319)
    generator = torch.Generator().manual_seed(3)
    for store in (*runner.cache.keys, *runner.cache.values):
        store.copy_(torch.randn(store.shape, generator=generator))
    rows = [Row(0, 16, 16), Row(1, 0, 0), Row(0, 24, 24), Row(1, 8, 8)]
    settled, tokens = torch.randint(318, (2, 2, 8), generator=generator).tolist()
    soft = SoftTokens(
        torch.rand(2, 8, generator=generator) < 0.5,
        torch.tensor(tokens)[..., None],
        torch.rand(2, 8, 1, generator=generator),
    )
    on_device = SoftTokens(*(each.to(device) for each in (soft.where, soft.ids, soft.probs)))
    with torch.no_grad():
        embeds = embed_tokens(runner.embed, torch.tensor(tokens).to(device), on_device, 319)
        output = runner.denoise(
            Shape.of(rows, 2, 8), Rows.of(rows, settled, 8).to(device), embeds, True
        )
    best = output.top(2)
    assert output.hidden_states is not None
    return best.ids.cpu(), best.probs.cpu(), output.hidden_states.cpu()


def test_a_step_is_the_same_with_and_without_kernels(triton_device: torch.device) -> None:
    ids, probs, hidden = step(torch.device("cpu"), "eager")
    with using("triton"):
        found_ids, found_probs, found_hidden = step(triton_device, "fused_moe")
    torch.testing.assert_close(found_hidden, hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_probs, probs, rtol=1e-4, atol=1e-5)
    assert torch.equal(found_ids, ids)
