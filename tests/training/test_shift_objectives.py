"""Losses and heads of models that predict a token at the position before it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, OPTConfig

from dmax import DMaxConfig, DMaxTrainer
from dmax.attention import block_causal, dense_mask
from dmax.baselines.head_states import Blocks
from dmax.baselines.objectives import d2f_loss, rising_ratios
from dmax.checkpoint import Checkpoint, new_checkpoint
from dmax.errors import InputError
from dmax.models import backbone
from dmax.records.encoding import Encoded
from dmax.training import objective_table
from dmax.training.clean_stream import CleanBatch, NoisyBatch
from dmax.training.data import Collator
from dmax.training.objectives import MDLM, mdlm_loss
from dmax.training.vocabulary import IGNORE

L = 4
MASK = 47
EOS = 46
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}


def made(shift: bool = True) -> Checkpoint:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, mask_token_id=MASK, block_length=L, shift=shift)
    return new_checkpoint(config, dtype=torch.float64)


@pytest.fixture
def batch() -> NoisyBatch:
    """Two sequences of 16 positions, whose prompts have 5 and 7."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(0, 40, (2, 16), generator=generator)
    answered = torch.arange(16) >= torch.tensor([[5], [7]])
    masked = answered & (torch.rand(clean.shape, generator=generator) < 0.6)
    return NoisyBatch(clean, clean.masked_fill(masked, MASK), clean.masked_fill(~answered, IGNORE))


def test_blocks_of_one_are_trained_as_an_autoregressive_model_is(batch: NoisyBatch) -> None:
    """Whatever is masked: the warm-up begins at the loss that such a model has."""
    model = made().model
    torch.manual_seed(0)
    original = LlamaForCausalLM(LlamaConfig(**SIZES)).double()
    original.load_state_dict(model.state_dict())
    logits = original(batch.clean_ids).logits[:, :-1]
    losses = F.cross_entropy(
        logits.transpose(1, 2), batch.labels[:, 1:], ignore_index=IGNORE, reduction="none"
    )
    expected = losses.sum() / (batch.labels != IGNORE).sum()
    found = mdlm_loss(model, batch, block_length=1, average="labels")
    torch.testing.assert_close(found.total, expected)
    at_the_position = mdlm_loss(made(shift=False).model, batch, block_length=1, average="labels")
    assert abs(at_the_position.total - expected) > 0.1


def test_d2f_reads_the_state_before_as_a_window_shows_it(batch: NoisyBatch) -> None:
    model = made().model
    answered = batch.labels != IGNORE
    ratios = rising_ratios(answered, batch.labels, L, 0.3, 0.7)
    places = torch.arange(16)
    visible = dense_mask(block_causal(L), places, places)[None, None]
    logits = model(input_ids=batch.noisy_ids, attention_mask=visible).logits.log_softmax(-1)
    losses, weights = [], []
    for row, place in ((batch.noisy_ids == MASK) & answered).nonzero().tolist():
        weights.append(1 / ratios[row, place])
        losses.append(-weights[-1] * logits[row, place - 1, batch.labels[row, place]])
    loss = d2f_loss(model, batch, ratios, block_length=L, mask_token_id=MASK, average="labels")
    torch.testing.assert_close(loss.total, sum(losses) / sum(weights))


@pytest.mark.parametrize("objective", sorted(objective_table().keys() - {"cforce"}))
def test_every_objective_learns_with_it(objective: str, tmp_path: Path) -> None:
    checkpoint = made()
    records = [
        {"prompt_ids": [k, k + 1, k + 2], "response_ids": [k + 3, k + 4, k + 5, k + 6]}
        for k in range(8)
    ]
    trainer = DMaxTrainer(
        checkpoint.model.float(),
        DMaxConfig(
            output_dir=str(tmp_path),
            objective=objective,
            mask_ratio_low=0.5,
            max_steps=30,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            gradient_checkpointing=True,
            learning_rate=0.01,
            warmup_steps=0,
            logging_steps=1,
            block_warmup=[[1, 5], [2, 5]],
            use_cpu=True,
            report_to=[],
            save_strategy="no",
        ),
        train_dataset=records,
    )
    trainer.train()
    assert trainer.model.config.shift is True
    losses = [line["loss_masked"] for line in trainer.state.log_history if "loss_masked" in line]
    if objective == "mmd":  # a policy gradient, whose value says nothing
        assert len(losses) == 30 and all(map(math.isfinite, losses))
    else:
        assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


EXAMPLE: Any = {"prompt_ids": [1, 2, 3], "response_ids": [4, 5, 6, 7, 8, 9]}


CONFIGS = [
    GPT2Config(n_positions=32, n_embd=16, n_layer=2, n_head=2, vocab_size=48),
    OPTConfig(
        max_position_embeddings=32,
        hidden_size=16,
        ffn_dim=16,
        word_embed_proj_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=48,
    ),
    LlamaConfig(
        **SIZES | {"max_position_embeddings": 32},
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    ),
]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_nobody_goes_beyond_the_context_because_of_a_neighbour(config: Any, shift: bool) -> None:
    """A response that starts late has fewer blocks than its neighbour: its copy counts on."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.update(
        {
            "eos_token_id": EOS,
            "bos_token_id": EOS,
            "pad_token_id": EOS,
            "mask_token_id": MASK,
            "block_length": L,
            "shift": shift,
        }
    )
    model = new_checkpoint(config, dtype=torch.float64).model
    late = Encoded(prompt_ids=[5] * 24, response_ids=[6] * 3)
    early = Encoded(prompt_ids=[5] * 2, response_ids=[7] * 25)
    clean = CleanBatch(**Collator(L, EOS, L)([late, early]))
    objective = MDLM(L, MASK, 0.5, 0.6, "sequences")
    batch, _ = objective.masked(clean, torch.Generator().manual_seed(0))
    assert batch.positions is not None and int(batch.positions.max()) > 31
    together = mdlm_loss(model, batch, block_length=L).total
    alone = [mdlm_loss(model, row_of(batch, row), block_length=L).total for row in range(2)]
    torch.testing.assert_close(together, torch.stack(alone).mean())


def row_of(batch: NoisyBatch, row: int) -> NoisyBatch:
    """One sequence, without the positions that only its neighbour needs."""
    assert batch.positions is not None
    length = batch.clean_ids.shape[1]
    positions = batch.positions[row : row + 1]
    positions = positions[:, : int((positions < length).sum())]
    kept = positions.shape[1]
    return NoisyBatch(
        batch.clean_ids[row : row + 1],
        batch.noisy_ids[row : row + 1, :kept],
        batch.labels[row : row + 1, :kept],
        positions,
    )


@torch.no_grad()
def test_heads_see_what_decoding_shows_them() -> None:
    checkpoint = made()
    model = checkpoint.model
    blocks = Blocks(model, [EXAMPLE], checkpoint.special_ids)
    logits, hidden = blocks.hidden_states(blocks.masked)
    torch.testing.assert_close(model.lm_head(hidden), logits)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, MASK, MASK, MASK, MASK]])
    places = torch.arange(12)
    visible = dense_mask(block_causal(L), places, places)[None, None]
    alone: Tensor = model(input_ids=ids, attention_mask=visible).logits[0]
    torch.testing.assert_close(logits[2], alone[7:11])


@torch.no_grad()
def test_a_head_of_hidden_states_needs_those_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "LINEAR_HEADS", ())
    checkpoint = made()
    blocks = Blocks(checkpoint.model, [EXAMPLE], checkpoint.special_ids)
    with pytest.raises(InputError, match="does not show the hidden states"):
        blocks.hidden_states(blocks.masked)
    assert blocks.denoise(blocks.masked).shape == (len(blocks.masked), L, 48)
