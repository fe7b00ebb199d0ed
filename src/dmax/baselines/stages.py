"""Stages of recorded trajectories: what stood in a block when so many tokens had been shown.

Shapes: B sequences of L positions, N blocks of W positions each, M writes of a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmax.errors import InputError
from dmax.params import MOST
from dmax.records.encoding import Encoded
from dmax.records.trajectories import REMASKED, Trajectory, read_trajectory
from dmax.training.clean_stream import CleanBatch
from dmax.training.data import Collator, check_example
from dmax.training.rollout import draw
from dmax.training.vocabulary import IGNORE

NEVER = MOST
"""In place of a step, and above all steps: nothing came to stand there (any more)."""
DRAWS = ("states", "cuts")
"""What `draw_stages` may draw evenly from."""
ANEW = "record it anew with `dmax distill --trajectories`"


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowedBatch(CleanBatch):
    """Responses as they were decoded, with all steps of the decoding.

    Attributes:
        write_steps: [B, L, M] int64, the steps of its block in which something new came to stand at
            a position, rising, then `NEVER`.
        write_tokens: [B, L, M] int64, what it was: a token, or `REMASKED`.
    """

    write_steps: Tensor
    write_tokens: Tensor


class TrajectoryCollator(Collator):
    """Makes a `FollowedBatch`: the clean tokens are the last ones of the trajectories.

    Labels are where the other objectives have them too, as far as the trajectory goes.
    """

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """The fields of a `FollowedBatch` by name.

        Raises:
            InputError: an example has no trajectory, or one of other blocks or another prompt, or
                it ends inside a block or before the response.
        """
        batch = super().__call__(examples)
        clean_ids = batch["clean_ids"]
        length = clean_ids.shape[1]
        all_writes = [self._trajectory(example)["writes"] for example in examples]
        most = max(len(writes) // 2 for row in all_writes for writes in row)
        pairs = clean_ids.new_tensor([NEVER, REMASKED]).repeat(*clean_ids.shape, most, 1)
        for row, (example, writes) in enumerate(zip(examples, all_writes, strict=True)):
            start = len(example["prompt_ids"])
            end = min(start + len(writes), length)
            padded = [each + [NEVER, REMASKED] * (most - len(each) // 2) for each in writes]
            last = torch.tensor([each[-1] for each in writes])
            pairs[row, start:end] = torch.tensor(padded).view(-1, most, 2)[: end - start]
            clean_ids[row, start:end] = last[: end - start]
            clean_ids[row, end:] = self.eos_token_id
        steps, tokens = pairs.unbind(dim=-1)
        is_labelled = (batch["labels"] != IGNORE) & (steps[..., 0] != NEVER)
        return {
            "clean_ids": clean_ids,
            "labels": clean_ids.masked_fill(~is_labelled, IGNORE),
            "corruptible": batch["corruptible"],
            "write_steps": steps.contiguous(),
            "write_tokens": tokens.contiguous(),
        }

    def check(self, examples: Any, known: tuple[int, int] | None = None) -> None:
        """As `Collator.check`; also raises `InputError` if an example has no usable trajectory."""
        super().check(examples)
        for number, example in enumerate(examples if hasattr(examples, "__len__") else (), 1):
            where = f"example {number}"
            trajectory = self._trajectory(example, where)
            if known is not None:
                written = {token for each in trajectory["writes"] for token in each[1::2]}
                followed = {**example, "response_ids": sorted(written - {REMASKED})}
                check_example(followed, *known, where)

    def _trajectory(self, example: Encoded, where: str = "an example") -> Trajectory:
        where = example.get("where", where)
        trajectory = read_trajectory(example.get("trajectory"))
        if trajectory is None:
            raise InputError(
                f"{where}: there is no trajectory to learn from",
                hint="write the responses with `dmax distill --trajectories`",
            )
        if trajectory["block_length"] != self.block_length:
            raise InputError(
                f"{where}: its trajectory has blocks of {trajectory['block_length']} positions, "
                f"and the model has blocks of {self.block_length}",
                hint="record it anew, or set `block_length` in `model`",
            )
        num_prompt = len(example["prompt_ids"])
        if trajectory["prompt_tokens"] != num_prompt:
            raise InputError(
                f"{where}: its trajectory follows {trajectory['prompt_tokens']} prompt tokens, and "
                f"the prompt has {num_prompt}",
                hint="tokenizer and chat template must be those of the model that was recorded",
            )
        self._check_end(example, trajectory["writes"], where)
        return trajectory

    def _check_end(self, example: Encoded, writes: Sequence[Sequence[int]], where: str) -> None:
        """Make sure that a trajectory goes on to the end of a block, and of the response.

        Positions that it leaves out of a block would show the block its own future. One with an EOS
        has ended, whatever its text is encoded to: half a character comes back as several tokens.
        """
        num_writes = len(writes)
        num_response = len(example["response_ids"])
        ends = {self.eos_token_id, *self.end_ids}
        has_ended = any(each[-1] in ends for each in writes)
        if (len(example["prompt_ids"]) + num_writes) % self.block_length:
            raise InputError(
                f"{where}: its trajectory of {num_writes} tokens ends inside a block", hint=ANEW
            )
        if num_writes < num_response and not (has_ended or example.get("is_cut")):
            raise InputError(
                f"{where}: its trajectory has {num_writes} tokens, and the response has "
                f"{num_response}",
                hint=ANEW,
            )


class Stages(NamedTuple):
    """Two adjacent stage states of every block.

    Attributes:
        early: [B, L] int64, MASK where nothing stood yet; prompt and padding as in the clean ids.
        late: [B, L] int64, the same at the next stage.
        edited: [B, L] bool, shown after the early state, and changed since then up to the late one.
    """

    early: Tensor
    late: Tensor
    edited: Tensor


def adjacent_stages(
    batch: FollowedBatch,
    width: int,
    *,
    block_length: int,
    mask_token_id: int,
    generator: torch.Generator,
    draws: str = DRAWS[0],
) -> Stages:
    """Two adjacent stage states of every block, drawn for each block by itself.

    Args:
        batch: responses and their trajectories.
        width: tokens that are newly shown from one stage to the next.
        block_length: W.
        mask_token_id: MASK.
        generator: random source of the draws.
        draws: as `draw_stages` takes it.
    """
    first = batch.write_steps[..., 0]  # [B, L], when a position was shown
    last = batch.write_steps.masked_fill(batch.write_steps == NEVER, 0).amax(dim=-1)  # [B, L]
    blocks = (-1, block_length)
    cuts = stage_cuts(first.view(blocks), last.view(blocks).amax(dim=1), width)  # [N, K]
    full = first.masked_fill(first == NEVER, 0).view(blocks).amax(dim=1)  # [N]
    early_step, late_step = draw_stages(cuts, full, generator, draws)  # [N]

    early, num_early = _state(batch, early_step, block_length, mask_token_id)
    late, num_late = _state(batch, late_step, block_length, mask_token_id)
    return Stages(early, late, edited=num_late - num_early > 1)


def stage_cuts(first: Tensor, last: Tensor, width: int) -> Tensor:
    """The steps in which blocks reach their stages S_0, S_1, …, the final state included.

    S_m is the first state in which at least m * width positions have been shown, or the final state
    if none has so many. A step that shows many tokens is the step of several stages.

    Args:
        first: [N, W] int64, the step in which each position was first shown, or `NEVER`.
        last: [N] int64, the last step that changed something; 0 in a block without a trajectory.
        width: at least 1.

    Returns:
        [N, K] int64, not falling; the first is 0, the state in which all is masked.
    """
    shown_at = first.sort(dim=1).values  # [N, W], when the n-th token was shown
    reached = shown_at[:, width - 1 :: width]  # [N, K - 2]
    last = last[:, None]
    return torch.cat((torch.zeros_like(last), reached, last), dim=1).minimum(last)


def draw_stages(
    cuts: Tensor, full: Tensor, generator: torch.Generator, draws: str = DRAWS[0]
) -> tuple[Tensor, Tensor]:
    """The steps of an early stage and of the next one that differs from it, for every block.

    Stages without a mask are never the early one, as they would teach nothing.

    Args:
        cuts: [N, K] int64, from `stage_cuts`.
        full: [N] int64, the step by which all positions have been shown.
        generator: random source, one number for each block.
        draws: "states": all distinct stage states are equally likely. "cuts": all stages are, so
            that a state which is that of several stages is drawn more often.

    Returns:
        Early and late steps, [N] int64 each; both 0 in a block without a trajectory.
    """
    stages, last = cuts[:, :-1], cuts[:, -1:]
    has_next = stages < (cuts[:, 1:] if draws == DRAWS[0] else last)
    eligible = has_next & (stages < full[:, None])  # [N, K - 1]
    number = draw(full.shape, generator, cuts.device) * eligible.sum(dim=1)
    drawn = (eligible.cumsum(dim=1) > number[:, None]).int().argmax(dim=1, keepdim=True)  # [N, 1]
    early = stages.gather(1, drawn)
    late = torch.where(cuts > early, cuts, last).amin(dim=1)
    return early[:, 0], late


def _state(
    batch: FollowedBatch, steps: Tensor, block_length: int, mask_token_id: int
) -> tuple[Tensor, Tensor]:
    """What stood in blocks after a step [N] each, [B, L] int64, and how many writes that took."""
    step = steps.repeat_interleave(block_length).view_as(batch.clean_ids)
    num_writes = (batch.write_steps <= step[..., None]).sum(dim=-1)  # [B, L]
    newest = (num_writes - 1).clamp(min=0)[..., None]
    token = batch.write_tokens.gather(-1, newest)[..., 0]
    is_masked = (num_writes == 0) | (token == REMASKED)
    ids = token.masked_fill(is_masked, mask_token_id)
    is_followed = batch.write_steps[..., 0] != NEVER
    return torch.where(is_followed, ids, batch.clean_ids), num_writes
