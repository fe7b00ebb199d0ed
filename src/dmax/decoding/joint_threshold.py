"""LLaDA-2.1's joint threshold: decode masks, and edit what is decoded when surely wrong (arXiv 2602.08676)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dmax.decoding import selection
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.settings import Configured
from dmax.params import check_number


@dataclass(frozen=True, slots=True)
class JointThreshold(Configured):
    """Decode masks with c >= threshold; overwrite a decoded token by another with c >= edit_threshold.

    SPD edits whatever the confidence, decodes prefixes alone and feeds decoded positions softly;
    else the two agree.

    Attributes:
        threshold: for masks; the most confident is always decoded.
        edit_threshold: for decoded positions; 0 edits every change of mind, None switches editing
            off.
        post_steps: further forwards once no mask is left, until one edits nothing.
    """

    name: ClassVar[str] = "joint_threshold"
    default_threshold: ClassVar[float] = 0.95  # of the published model code, as are the others

    threshold: float
    edit_threshold: float | None = 0.9
    post_steps: int = 16

    def __post_init__(self) -> None:
        """Raises `InputError` for a setting out of range."""
        check_number("edit_threshold", self.edit_threshold, low=0, high=1, optional=True)
        check_number("post_steps", self.post_steps, low=0, whole=True)

    @property
    def extra_steps(self) -> int:
        """Forwards that a block may take beyond one per position."""
        return 0 if self.edit_threshold is None else self.post_steps

    def open(self, view: View) -> State:
        """Forwards spent since no mask is left."""
        return {"post_steps": torch.zeros_like(view.step)}

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step for [B, L] positions."""
        prediction = predict(view, output)
        tokens = prediction.tokens
        confidence = prediction.confidence
        commit = selection.above(view.masked, confidence, self.threshold)
        if self.edit_threshold is None:
            return Decision(tokens, commit, confidence=confidence), state
        edit = (
            view.active
            & ~view.masked
            & (tokens != view.tokens)
            & (confidence >= self.edit_threshold)
        )
        was_full = ~view.masked.any(dim=1)
        spent = state["post_steps"] + was_full
        settled = (was_full & ~edit.any(dim=1)) | (spent >= self.post_steps)
        return Decision(tokens, commit, edit=edit, done=settled, confidence=confidence), {
            "post_steps": spent
        }
