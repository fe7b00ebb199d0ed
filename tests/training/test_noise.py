"""Corruption: how much, where, and with what."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dmax.baselines.objectives import rising_ratios
from dmax.records.encoding import Encoded
from dmax.training.data import Collator
from dmax.training.noise import mask_ratios, mask_tokens, random_tokens
from dmax.training.vocabulary import IGNORE

VOCAB = 50
MASK = 17


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clean(batch: int = 8, length: int = 2000) -> Tensor:
    ids = torch.randint(VOCAB - 1, (batch, length), generator=seeded(99))
    return ids + (ids >= MASK)  # clean text holds no MASK


def response(ids: Tensor, prompt: int) -> Tensor:
    return (torch.arange(ids.shape[1]) >= prompt).expand_as(ids)


def test_ratios_lie_in_their_range() -> None:
    ratios = mask_ratios(10_000, 0.3, 0.8, seeded())
    assert ratios.dtype == torch.float32
    assert 0.3 <= ratios.min() < 0.31 and 0.79 < ratios.max() <= 0.8
    assert ratios.mean() == pytest.approx(0.55, abs=0.01)
    assert (mask_ratios(100, 0.75, 0.75, seeded()) == 0.75).all()  # the paper's fixed ratio


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), prompt=st.integers(0, 40), ratio=st.floats(0, 1))
def test_the_prompt_is_never_touched(seed: int, prompt: int, ratio: float) -> None:
    ids = clean(2, 40)
    ratios = torch.full((2,), ratio)
    masked = mask_tokens(ids, response(ids, prompt), ratios, MASK, seeded(seed))
    random = random_tokens(ids, response(ids, prompt), ratios, VOCAB, MASK, seeded(seed))
    assert torch.equal(masked[:, :prompt], ids[:, :prompt])
    assert torch.equal(random[:, :prompt], ids[:, :prompt])
    assert ((masked == ids) | (masked == MASK)).all()
    assert ((random >= 0) & (random < VOCAB) & (random != MASK)).all()


def test_each_sequence_is_masked_at_its_own_ratio() -> None:
    ids = clean()
    ratios = torch.linspace(0, 1, 8)
    masked = mask_tokens(ids, response(ids, 500), ratios, MASK, seeded()) == MASK
    shares = masked[:, 500:].float().mean(dim=1)
    torch.testing.assert_close(shares, ratios, atol=0.04, rtol=0)
    assert shares[0] == 0 and shares[-1] == 1


def test_random_tokens_are_uniform_over_everything_but_mask() -> None:
    ids = clean()
    noisy = random_tokens(ids, response(ids, 0), torch.ones(8), VOCAB, MASK, seeded())
    counts = noisy.flatten().bincount(minlength=VOCAB).float()
    assert counts[MASK] == 0
    others = torch.cat((counts[:MASK], counts[MASK + 1 :]))
    expected = ids.numel() / (VOCAB - 1)
    chi_square = ((others - expected) ** 2 / expected).sum()
    assert chi_square < 95  # 48 degrees of freedom: 95 is past the 99.99th percentile


@pytest.mark.parametrize("mask_token_id", [0, VOCAB - 1])
def test_random_tokens_skip_mask_at_either_end_of_the_vocabulary(mask_token_id: int) -> None:
    ids = torch.full((1, 5000), 3)
    noisy = random_tokens(
        ids, torch.ones_like(ids).bool(), torch.ones(1), VOCAB, mask_token_id, seeded()
    )
    assert noisy.unique().tolist() == [token for token in range(VOCAB) if token != mask_token_id]


def test_random_ratio_counts_positions_drawn() -> None:
    ids = clean()
    noisy = random_tokens(ids, response(ids, 0), torch.full((8,), 0.5), VOCAB, MASK, seeded())
    changed = (noisy != ids).float().mean().item()
    assert changed == pytest.approx(
        0.5 * (1 - 1 / (VOCAB - 1)), abs=0.02
    )  # a draw may repeat the clean token


def test_noise_is_reproducible_and_leaves_its_input_alone() -> None:
    ids = clean(2, 100)
    before = ids.clone()
    ratios = torch.full((2,), 0.5)
    one = mask_tokens(ids, response(ids, 10), ratios, MASK, seeded(5))
    assert torch.equal(one, mask_tokens(ids, response(ids, 10), ratios, MASK, seeded(5)))
    assert not torch.equal(one, mask_tokens(ids, response(ids, 10), ratios, MASK, seeded(6)))
    assert torch.equal(ids, before)


def test_ratios_rise_from_the_first_block_of_the_response_to_the_last() -> None:
    corruptible = torch.arange(12) >= torch.tensor([[2], [5], [9]])
    labels = torch.zeros(3, 12, dtype=torch.int64).masked_fill(~corruptible, IGNORE)
    ratios = rising_ratios(corruptible, labels, 4, 0.3, 0.7)
    expected = [[0.3] * 4 + [0.5] * 4 + [0.7] * 4, [0.3] * 8 + [0.7] * 4, [0.3] * 12]
    torch.testing.assert_close(ratios, torch.tensor(expected))


@pytest.mark.parametrize("pad_to", [None, 32, 61])
@pytest.mark.parametrize("neighbours", [[], [24], [4, 11]])
def test_rising_ratios_are_those_of_a_response_alone(
    neighbours: list[int], pad_to: int | None
) -> None:
    """Whatever else is in its batch, and however far that is padded; labelled EOS belong to it."""
    examples = [Encoded(prompt_ids=[1] * 4, response_ids=[1] * n) for n in (4, 11, *neighbours)]
    fields = Collator(4, 0, 4, pad_to)(examples)
    ratios = rising_ratios(fields["corruptible"], fields["labels"], 4, 0.3, 0.7)
    padding = ratios.shape[1] // 4
    one = ([0.3, 0.3, 0.7] + [0.7] * padding)[:padding]
    other = ([0.3, 0.3, 1.3 / 3, 1.7 / 3, 0.7] + [0.7] * padding)[:padding]
    expected = torch.tensor([one, other]).repeat_interleave(4, dim=1)
    torch.testing.assert_close(ratios[:2], expected)


def test_a_ratio_for_every_position_masks_by_it() -> None:
    ids = torch.arange(8)[None]
    corruptible = torch.ones(1, 8, dtype=torch.bool)
    ratios = torch.tensor([[1.0] * 3 + [0.0] * 5])
    masked = mask_tokens(ids, corruptible, ratios, 9, torch.Generator().manual_seed(0))
    assert masked.tolist() == [[9, 9, 9, 3, 4, 5, 6, 7]]
