"""Bounds for SchED (`sched.py`) that fit a model.

SchED compares margins of raw logits with its bounds. No two models share the scale of their logits,
so every model needs bounds of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmax.baselines import selection
from dmax.baselines.head_states import Blocks, by_length, replay
from dmax.baselines.sched import ScheduledExit, mean_margin
from dmax.decoding.block import Output
from dmax.decoding.selection import most_confident
from dmax.errors import InputError
from dmax.llm import LLM
from dmax.params import DecodingParams, check_number
from dmax.prompts import Prompt
from dmax.records.encoding import Encoded

UNREACHABLE = 1e9  # no margin is as large, so that no block is left early
HUNDREDTHS = 100  # `high` is a whole number of hundredths
RECORDED_TOGETHER = 16


@dataclass(frozen=True, slots=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        high: option of `sched`.
        low: option of `sched`.
        num_blocks: blocks that the bounds were chosen on.
        premature: share of these blocks that would be left before all predictions were final.
        forwards_per_block: mean number of forwards with these bounds.
        sequential_forwards_per_block: mean number of forwards at one token a step.
    """

    high: float
    low: float
    num_blocks: int
    premature: float
    forwards_per_block: float
    sequential_forwards_per_block: float


@dataclass(frozen=True, slots=True)
class Margins:
    """What decoding at one token a step showed, in T steps of N blocks.

    Attributes:
        margin: [T, N] float32, mean margin of the masks.
        is_final: [T, N] bool, every mask's prediction is already the token that it got in the end.
        is_open: [T, N] bool, the block still has masks.
    """

    margin: Tensor
    is_final: Tensor
    is_open: Tensor


def calibrate(
    llm: LLM,
    prompts: Sequence[Prompt],
    *,
    risk: float = 0.05,
    ratio: float = 1 / 3,
    max_new_tokens: int = 256,
) -> Calibration:
    """Bounds of the cosine schedule at which at most a share `risk` of the blocks changes.

    The prompts are answered one token a step, in the order of `sched`. Leaving a block is premature
    while the prediction at a mask differs from the token that it got in the end. `choose_bounds`
    has the rule. `risk` counts every change: another wording is one too, so accuracy falls by less.

    Args:
        llm: the model.
        prompts: as `LLM.generate` takes them. A hundred give some hundred blocks.
        risk: share of blocks that may change.
        ratio: low / high. The paper's bounds are 2.5 and 7.5.
        max_new_tokens: longest answer. Unfinished answers are left out.

    Raises:
        InputError: a number out of range, or no prompt is answered within `max_new_tokens`.
    """
    check_number("risk", risk, low=0, high=1)
    check_number("ratio", ratio, low=0, high=1)
    never_early = {"high": UNREACHABLE, "low": UNREACHABLE}
    params = DecodingParams("sched", max_new_tokens=max_new_tokens, options=never_early)
    outputs = llm.generate(list(prompts), params)
    answers = [
        Encoded(prompt_ids=list(output.prompt_token_ids), response_ids=list(output.token_ids))
        for output in outputs
        if output.finish_reason == "stop"
    ]
    if not answers:
        raise InputError(
            f"none of {len(outputs)} prompts is answered within {max_new_tokens} tokens",
            hint="give prompts that the model can answer, or raise `max_new_tokens`",
        )
    margins = record_margins(llm, answers)
    block_length = llm.checkpoint.special_ids.block_length
    return choose_bounds(margins, block_length, risk=risk, ratio=ratio)


@torch.no_grad()
def record_margins(llm: LLM, answers: Sequence[Encoded]) -> Margins:
    """Margins at every step of decoding these answers, least uncertain position first."""
    special_ids = llm.checkpoint.special_ids
    ordered = by_length(answers)
    parts = []
    for first in range(0, len(ordered), RECORDED_TOGETHER):
        group = ordered[first : first + RECORDED_TOGETHER]
        blocks = Blocks(llm.model, group, special_ids)
        parts.append(_replay_margins(blocks, special_ids.mask_token_id))
    return Margins(
        torch.cat([part.margin for part in parts], dim=1),
        torch.cat([part.is_final for part in parts], dim=1),
        torch.cat([part.is_open for part in parts], dim=1),
    )


def _replay_margins(blocks: Blocks, mask_token_id: int) -> Margins:
    """Margins of some blocks, without those that are only padding."""

    def surest(masked: Tensor, logits: Tensor, final: Tensor) -> Tensor:
        entropy = selection.entropy(Output(logits, mask_token_id).logits)
        return most_confident(masked, -entropy)

    num_blocks, length = blocks.final.shape
    margin = torch.zeros(length, num_blocks)
    is_final = torch.ones(length, num_blocks, dtype=torch.bool)
    is_open = torch.zeros(length, num_blocks, dtype=torch.bool)
    for step, (masked, logits) in enumerate(replay(blocks, surest)):
        output = Output(logits, mask_token_id)
        predicted = output.top(1).ids[..., 0]  # [N, L]
        differs = masked & (predicted != blocks.final)
        margin[step] = mean_margin(output.logits, masked)[:, 0].cpu()
        is_final[step] = ~differs.any(dim=1).cpu()
        is_open[step] = masked.any(dim=1).cpu()
    filled = is_open[0]
    return Margins(margin[:, filled], is_final[:, filled], is_open[:, filled])


def choose_bounds(margins: Margins, block_length: int, *, risk: float, ratio: float) -> Calibration:
    """The lowest bounds at which at most a share `risk` of the blocks is left too early.

    The bound at step t is high · s(t), where s is the schedule from 1 to `ratio`. A block is left
    too early if its margin m_t reaches the bound at a step t whose predictions are not final yet.
    That is so if high is at most the largest m_t / s(t) over those t. `high` is therefore just
    above the (1 - risk) quantile of these largest values over the blocks, and `low` is
    ratio · high. On the blocks that it was taken on, the share is exact.
    """
    progress = torch.arange(len(margins.margin)) / max(block_length - 1, 1)
    schedule = ScheduledExit(high=1.0, low=ratio).bound(progress)[:, None]  # [T, 1]

    scaled = margins.margin / schedule.clamp(min=1e-6)
    not_final = margins.is_open & ~margins.is_final
    highest = torch.where(not_final, scaled, 0.0).max(dim=0).values  # [N]
    num_within = math.ceil(len(highest) * (1 - risk) - 1e-9)  # at most risk · N lie above
    quantile = highest.sort().values[max(num_within - 1, 0)].item()
    high = (math.floor(quantile * HUNDREDTHS) + 1) / HUNDREDTHS

    leaves = margins.is_open & (margins.margin >= high * schedule)
    sequential = margins.is_open.sum(dim=0)  # [N], steps
    steps = torch.where(leaves.any(dim=0), leaves.int().argmax(dim=0) + 1, sequential)
    return Calibration(
        high=high,
        low=high * ratio,
        num_blocks=len(highest),
        premature=(highest >= high).float().mean().item(),
        forwards_per_block=steps.float().mean().item(),
        sequential_forwards_per_block=sequential.float().mean().item(),
    )
