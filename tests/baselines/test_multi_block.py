"""States of several open blocks in training: who sees whom, how many masks, what is learnt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import small_network
from torch import Tensor

from dmax.attention import block_causal, dense_mask, noisy_clean
from dmax.baselines.multi_block import (
    MultiBlockOPUT,
    buffer_ratios,
    draw_shifts,
    mask_blocks,
    second_blocks,
    seen_before,
)
from dmax.errors import InputError
from dmax.training.clean_stream import CleanBatch, NoisyBatch
from dmax.training.objectives import OPUT, oput_loss
from dmax.training.vocabulary import IGNORE

BLOCK = 4
VOCAB = 48
MASK = 47
EOS = 46


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def clean() -> CleanBatch:
    """Prompts of 9 and 13 tokens in blocks of 4; the second response is one block shorter."""
    ids = torch.randint(EOS, (2, 7 * BLOCK), generator=seeded(1))
    is_response = torch.arange(7 * BLOCK) >= torch.tensor([[9], [13]])
    labels = ids.masked_fill(~is_response, IGNORE)
    labels[1, 6 * BLOCK :] = IGNORE
    return CleanBatch(ids, labels, is_response)


def objective(**changes: Any) -> MultiBlockOPUT:
    settings = {
        "block_length": BLOCK,
        "mask_token_id": MASK,
        "mask_ratio_low": 0.45,
        "mask_ratio_high": 0.55,
        "loss_average": "sequences",
        "rollout": "argmax",
        "rollout_temperature": 1.0,
    }
    return MultiBlockOPUT.from_settings(settings | changes)


# --- who sees whom --------------------------------------------------------------------------------


def test_a_noisy_block_sees_its_buffer_and_the_clean_blocks_before_it() -> None:
    """Blocks of one token, two of them prompt; n is a noisy block, c a clean one, by position."""
    noisy = torch.tensor([2, 3, 4, 5, 6])
    clean = torch.arange(7)
    seen = {
        # buffers (2 3) (4 5) (6)
        (0, 1, 0, 1, 0): {
            "n2": "n2 c0 c1",
            "n3": "n2 n3 c0 c1",
            "n4": "n4 c0 c1 c2 c3",
            "n5": "n4 n5 c0 c1 c2 c3",
            "n6": "n6 c0 c1 c2 c3 c4 c5",
        },
        # buffers (2) (3 4) (5 6)
        (0, 0, 1, 0, 1): {
            "n2": "n2 c0 c1",
            "n3": "n3 c0 c1 c2",
            "n4": "n3 n4 c0 c1 c2",
            "n5": "n5 c0 c1 c2 c3 c4",
            "n6": "n5 n6 c0 c1 c2 c3 c4",
        },
    }
    names = [f"n{p}" for p in noisy.tolist()] + [f"c{p}" for p in clean.tolist()]
    length = 12
    for places, expected in seen.items():
        index = torch.cat((noisy - length * torch.tensor(places), length + clean))
        visible = dense_mask(noisy_clean(1, length), index, index)
        found = {
            name: " ".join(key for key, sees in zip(names, row, strict=True) if sees)
            for name, row in zip(names, visible.tolist(), strict=True)
        }
        of_clean = {f"c{p}": " ".join(f"c{q}" for q in range(p + 1)) for p in range(7)}
        assert found == expected | of_clean


def test_the_two_layouts() -> None:
    is_second = second_blocks(torch.tensor([0, 1]), 5)
    assert is_second.int().tolist() == [[0, 1, 0, 1, 0], [1, 0, 1, 0, 1]]
    assert seen_before(is_second).tolist() == [[0, 1, 0, 1, 0], [0, 0, 1, 0, 1]]
    shifts = draw_shifts(2000, seeded())
    assert set(shifts.tolist()) == {0, 1}
    assert shifts.float().mean().item() == pytest.approx(0.5, abs=0.04)


# --- how many masks -------------------------------------------------------------------------------


def test_ratios_rise_inside_a_buffer() -> None:
    is_second = second_blocks(draw_shifts(1000, seeded()), 6)
    ratios = buffer_ratios(is_second, 0.2, 0.8, seeded())
    first, second = ratios[~is_second], ratios[is_second]
    assert 0 <= first.min() < 0.01 and 0.19 < first.max() <= 0.2
    assert 0.8 <= second.min() < 0.81 and 0.99 < second.max() <= 1
    assert first.mean().item() == pytest.approx(0.1, abs=0.01)
    assert second.mean().item() == pytest.approx(0.9, abs=0.01)


def test_an_exact_share_of_what_may_change_is_masked() -> None:
    ids = torch.randint(EOS, (3, 16), generator=seeded())
    corruptible = torch.ones(3, 16, dtype=torch.bool)
    corruptible[1, :5] = False  # this prompt ends in its first block
    ratios = torch.tensor([[0.2, 0.99], [0.8, 1.0], [0.0, 0.5]])
    noisy = mask_blocks(ids, corruptible, ratios, MASK, seeded())
    masked = noisy == MASK
    assert masked.view(3, 2, 8).sum(dim=-1).tolist() == [[1, 7], [2, 8], [0, 4]]
    assert not (masked & ~corruptible).any()
    assert torch.equal(noisy[~masked], ids[~masked])


def test_every_position_of_a_block_is_masked_equally_often() -> None:
    ids = torch.zeros(4000, 8, dtype=torch.long)
    corruptible = torch.ones_like(ids, dtype=torch.bool)
    noisy = mask_blocks(ids, corruptible, torch.full((4000, 1), 0.25), MASK, seeded())
    shares = (noisy == MASK).float().mean(dim=0)
    torch.testing.assert_close(shares, torch.full((8,), 0.25), atol=0.03, rtol=0)


# --- what is learnt -------------------------------------------------------------------------------


def test_positions_and_labels_are_those_of_oput(clean: CleanBatch) -> None:
    ours, share = objective().masked(clean, seeded())
    plain = OPUT(BLOCK, MASK, 0.75, 0.75, "sequences", "argmax", 1.0)
    theirs, _ = plain.masked(clean, seeded())
    assert torch.equal(ours.positions, theirs.positions)  # type: ignore[arg-type]
    assert torch.equal(ours.labels, theirs.labels)
    masked = ours.noisy_ids == MASK
    allowed = torch.tensor([7 + 12, 3 + 12])  # the second copy goes on beyond the sequence
    torch.testing.assert_close(share, masked.sum(dim=1) / allowed)


def test_the_same_generator_gives_the_same_states(clean: CleanBatch) -> None:
    def states(seed: int) -> tuple[list[Any], list[Any]]:
        batch, _ = objective().masked(clean, seeded(seed))
        assert batch.places is not None
        return batch.noisy_ids.tolist(), batch.places.tolist()

    assert states(0) == states(0)
    layouts = {str(states(seed)[1]) for seed in range(20)}
    assert len(layouts) == 4  # two rows, each in one of two layouts


def test_ratios_have_to_part_the_blocks_of_a_pair() -> None:
    with pytest.raises(InputError, match="must be more, got 0.75 and 0.75") as error:
        objective(mask_ratio_low=0.75, mask_ratio_high=0.75)
    assert error.value.hint == "the source has `mask_ratio_low: 0.2` and `mask_ratio_high: 0.8`"


@pytest.mark.parametrize("rollout", ["soft", "spd"])
def test_blends_are_refused(rollout: str) -> None:
    with pytest.raises(InputError, match="`rollout` of mbd_oput must be argmax or sample, got"):
        objective(rollout=rollout)


def logits_of_buffers(network: Any, batch: NoisyBatch, ids: Tensor) -> Tensor:
    """Logits [B, L', V] of noisy ids, a plain forward over [clean blocks | noisy blocks] each."""
    assert batch.positions is not None and batch.places is not None
    found = []
    for row in range(len(ids)):
        logits = []
        for start in range(0, ids.shape[1], BLOCK):
            before = int(batch.places[row, start])  # noisy blocks that this one sees
            begin = start - before * BLOCK
            context = batch.clean_ids[row, : int(batch.positions[row, begin])]
            tokens = torch.cat((context, ids[row, begin : start + BLOCK]))
            index = torch.arange(len(tokens))
            visible = dense_mask(block_causal(BLOCK), index, index)[None, None]
            output = network(input_ids=tokens[None], attention_mask=visible)
            logits.append(output.logits[0, -BLOCK:])
        found.append(torch.cat(logits))
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["llada2_moe", "llama"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_and_gradient_are_those_of_a_forward_for_every_block(
    kind: str, seed: int, clean: CleanBatch
) -> None:
    """Masks, then predictions in their place, each block after the noisy one that it sees."""
    network = small_network(kind, "sdpa", vocab_size=VOCAB, eos=EOS, head_dim=8)
    short = replace(clean, clean_ids=clean.clean_ids[:1], labels=clean.labels[:1])
    one = replace(short, corruptible=clean.corruptible[:1])  # of which no position lies beyond
    batch, _ = objective().masked(one, seeded(seed))
    masked = batch.noisy_ids == MASK

    ours = oput_loss(network, batch, block_length=BLOCK, mask_token_id=MASK)
    ours.total.backward()
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()

    logits = logits_of_buffers(network, batch, batch.noisy_ids)
    best = logits.detach().index_fill(-1, torch.tensor(MASK), -torch.inf).argmax(dim=-1)
    predicted = logits_of_buffers(network, batch, torch.where(masked, best, batch.noisy_ids))
    losses = [F.cross_entropy(each[0], batch.labels[0]) for each in (logits, predicted)]
    expected = (losses[0] + losses[1]) / 2
    expected.backward()
    torch.testing.assert_close(ours.total, expected)
    torch.testing.assert_close(ours.parts["loss_predicted"], losses[1].detach())
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3)
