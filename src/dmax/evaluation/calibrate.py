"""Bounds for SchED (`decoding/sched.py`) that fit a model: its margins are raw logits, which no two models share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmax.baselines import selection
from dmax.baselines.head_states import Blocks, replay
from dmax.baselines.sched import ScheduledExit, mean_margin
from dmax.decoding.block import Output
from dmax.errors import InputError
from dmax.llm import LLM, Prompt
from dmax.params import DecodingParams, check_number
from dmax.training.data import Encoded

NEVER = 1e9  # no margin reaches it
PLACES = 100  # bounds are whole hundredths
RECORDED_TOGETHER = 16


@dataclass(frozen=True, slots=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        high, low: options of `sched`.
        num_blocks: blocks they were chosen on.
        premature: share of these that would be left before all predictions were final.
        forwards_per_block: with these bounds, mean; `sequential_forwards_per_block`: at one token a
            step.
    """

    high: float
    low: float
    num_blocks: int
    premature: float
    forwards_per_block: float
    sequential_forwards_per_block: float


@dataclass(frozen=True, slots=True)
class Margins:
    """What one-token-a-step decoding showed, T steps of N blocks.

    Attributes:
        margin: [T, N] float32, mean margin of the masks.
        final: [T, N] bool, every mask's prediction is already the token that it got in the end.
        open: [T, N] bool, there were masks.
    """

    margin: Tensor
    final: Tensor
    open: Tensor


def calibrate(
    llm: LLM,
    prompts: Sequence[Prompt],
    *,
    risk: float = 0.05,
    ratio: float = 1 / 3,
    max_new_tokens: int = 256,
) -> Calibration:
    """Bounds of the cosine schedule at which at most a share `risk` of the blocks changes for leaving early.

    The prompts are answered one token a step, in `sched`'s order. Leaving is premature while a
    mask's prediction differs from the token that it got in the end; see `choose` for the rule. Risk
    is of a *change*: another wording counts as one, so accuracy falls by less.

    Args:
        llm: the model.
        prompts: as `LLM.generate` takes them; a hundred give some hundred blocks.
        risk: share of blocks that may change.
        ratio: low / high; the paper's bounds have 2.5 / 7.5.
        max_new_tokens: longest answer; unfinished ones are left out.

    Raises:
        InputError: a number out of range, or no prompt is answered within `max_new_tokens`.
    """
    check_number("risk", risk, low=0, high=1)
    check_number("ratio", ratio, low=0, high=1)
    params = DecodingParams(
        strategy="sched", max_new_tokens=max_new_tokens, options={"high": NEVER, "low": NEVER}
    )
    outputs = llm.generate(list(prompts), params)
    answers = [
        Encoded(list(output.prompt_token_ids), list(output.token_ids))
        for output in outputs
        if output.finish_reason == "stop"
    ]
    if not answers:
        raise InputError(
            f"none of {len(outputs)} prompts is answered within {max_new_tokens} tokens",
            hint="give prompts that the model can answer, or raise `max_new_tokens`",
        )
    length = llm.checkpoint.special_ids.block_length
    return choose(record(llm, answers), length, risk=risk, ratio=ratio)


@torch.no_grad()
def record(llm: LLM, answers: Sequence[Encoded]) -> Margins:
    """Margins at every step of decoding these answers, least uncertain position first."""
    checkpoint = llm.checkpoint
    special = checkpoint.special_ids

    def surest(masked: Tensor, logits: Tensor, final: Tensor) -> Tensor:
        entropy = selection.entropy(Output(logits, special.mask_token_id).logits)
        return selection.top(
            masked, -entropy, torch.ones(len(masked), dtype=torch.long, device=masked.device)
        )

    ordered = sorted(answers, key=len)
    found = []
    for first in range(0, len(ordered), RECORDED_TOGETHER):
        blocks = Blocks(llm.model, ordered[first : first + RECORDED_TOGETHER], special)
        length = special.block_length
        shape = (length, len(blocks.final))
        margin = torch.zeros(shape)
        final = torch.ones(shape, dtype=torch.bool)
        open_ = torch.zeros(shape).bool()
        for step, (masked, logits) in enumerate(replay(blocks, surest)):
            output = Output(logits, special.mask_token_id)
            margin[step] = mean_margin(output.logits, masked)[:, 0].cpu()
            final[step] = ~(masked & (output.top(1).ids[..., 0] != blocks.final)).any(dim=1).cpu()
            open_[step] = masked.any(dim=1).cpu()
        filled = open_[0]  # the others are padding
        found.append((margin[:, filled], final[:, filled], open_[:, filled]))
    return Margins(*(torch.cat(parts, dim=1) for parts in zip(*found, strict=True)))


def choose(margins: Margins, block_length: int, *, risk: float, ratio: float) -> Calibration:
    """`high` is just above the (1 - risk) quantile, over blocks, of the highest one that they would leave too early at.

    With bound(t) = high · s(t), s the schedule from 1 to `ratio`, a block is left too early if its
    margin m_t reaches the bound at a step t whose predictions are not final yet: if max over those
    t of m_t / s(t) >= high. The quantile of these maxima is therefore exact on the blocks it was
    taken on, and `low` = ratio · high.
    """
    progress = torch.arange(len(margins.margin)) / max(block_length - 1, 1)
    shape = ScheduledExit(high=1.0, low=ratio).bound(progress)[:, None]  # [T, 1]
    too_early = torch.where(
        margins.open & ~margins.final, margins.margin / shape.clamp(min=1e-6), 0.0
    )
    highest = too_early.max(dim=0).values  # [N]
    rank = max(
        math.ceil(len(highest) * (1 - risk) - 1e-9) - 1, 0
    )  # so that at most risk · N lie above
    high = (math.floor(highest.sort().values[rank].item() * PLACES) + 1) / PLACES
    leaves = margins.open & (margins.margin >= high * shape)
    sequential = margins.open.sum(dim=0)  # [N], steps
    until = torch.where(leaves.any(dim=0), leaves.int().argmax(dim=0) + 1, sequential)
    return Calibration(
        high=high,
        low=high * ratio,
        num_blocks=len(highest),
        premature=(highest >= high).float().mean().item(),
        forwards_per_block=until.float().mean().item(),
        sequential_forwards_per_block=sequential.float().mean().item(),
    )
