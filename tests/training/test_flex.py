"""Training through `flex_attention` against dense masks, forward only: on a CPU it has no backward.

Sequences of a batch have their noisy blocks at different places, so each has a mask of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import small_network
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention
from transformers.integrations import flex_attention as integration

from dmax.attention import noisy_clean, training_mask
from dmax.training.clean_stream import IGNORE, CleanBatch, noisy_positions
from dmax.training.objectives import OPUT, ObjectiveModule

BLOCK = 32
VOCAB = 48
MASK = 47
EOS = 46


def ragged() -> CleanBatch:
    """Prompts of 3, 70 and 170 tokens, answers that end at 40, 135 and 200, one block of EOS."""
    clean_ids = torch.randint(EOS, (3, 8 * BLOCK), generator=torch.Generator().manual_seed(1))
    position = torch.arange(clean_ids.shape[1])
    ends = torch.tensor([[40], [135], [200]])
    clean_ids = clean_ids.where(position < ends, EOS)
    corruptible = position >= torch.tensor([[3], [70], [170]])
    labelled = corruptible & (position < ends + BLOCK)
    return CleanBatch(clean_ids, clean_ids.masked_fill(~labelled, IGNORE), corruptible)


def materialized(mask: BlockMask) -> Tensor:
    """What the kernel computes, [B, L, S]: the predicate within the tiles of the block mask."""
    rows, columns = mask.BLOCK_SIZE
    tiles = mask.to_dense()[:, 0].bool().repeat_interleave(rows, 1).repeat_interleave(columns, 2)
    sizes = mask.seq_lengths
    predicate = create_mask(mask.mask_mod, len(tiles), 1, *sizes, device="cpu")[:, 0]
    return predicate & tiles[:, : sizes[0], : sizes[1]]


@pytest.mark.parametrize("buffer", [1, 2], ids=["one open block", "two"])
@pytest.mark.parametrize("rows", [slice(None), slice(1)], ids=["three rows", "one row"])
def test_masks_from_the_predicate_are_the_dense_ones(rows: slice, buffer: int) -> None:
    """Those of the first forward over [noisy | clean], and of later ones over [clean | noisy]."""
    noisy = noisy_positions(ragged(), BLOCK)[rows]
    clean = torch.arange(7 * BLOCK).expand(len(noisy), -1)
    offset = 8 * BLOCK + noisy.shape[1]
    visible = noisy_clean(BLOCK, offset)
    noisy = noisy - offset * (torch.arange(noisy.shape[1]) // BLOCK % buffer)
    first = torch.cat((noisy, offset + clean), dim=1)
    later = torch.cat((offset + clean, noisy), dim=1)
    for queries, keys in ((first, first), (noisy, later)):
        dense: Any = training_mask(visible, queries, keys, "sdpa")
        flex: Any = training_mask(visible, queries, keys, "flex_attention")
        assert torch.equal(materialized(flex), dense[:, 0])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["llada2_moe", "llama"])
def test_the_loss_through_flex_is_that_through_sdpa(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def uncompiled(query: Any, key: Any, value: Any, training: bool, **options: Any) -> Any:
        return flex_attention(query, key, value, **options)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", uncompiled)
    clean = ragged()
    found = []
    for attention in ("sdpa", "flex_attention"):
        network = small_network(kind, attention, vocab_size=VOCAB, eos=EOS, head_dim=16)
        objective = OPUT(BLOCK, MASK, 0.75, 0.75, "sequences", "argmax", 1.0)
        module = ObjectiveModule(network, objective)
        with torch.no_grad():
            inputs = {name: getattr(clean, name) for name in CleanBatch.__dataclass_fields__}
            found.append(module(torch.Generator().manual_seed(2), **inputs))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
