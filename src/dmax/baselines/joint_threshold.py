"""LLaDA-2.1's joint threshold: decode masks, edit what is surely wrong (arXiv 2602.08676)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.selection import above
from dmax.decoding.strategy import Number, Strategy, number, whole


@dataclass(frozen=True)
class JointThreshold(Strategy):
    """Decode masks with c >= threshold; overwrite a decoded token by one with c >= edit_threshold.

    SPD edits whatever the confidence, decodes prefixes only and feeds decoded positions softly;
    otherwise the two agree.

    Attributes:
        threshold: for masks; the most confident one is always decoded.
        edit_threshold: for decoded positions; 0 edits every change of mind, None edits nothing.
        post_steps: further forwards once no mask is left, until one edits nothing.
        extra_steps: forwards that a block may take beyond one for every position.
    """

    name: ClassVar[str] = "joint_threshold"
    default_threshold: ClassVar[float] = 0.95  # of the published model code, as are the others

    threshold: Number = number(high=1)
    edit_threshold: Number | None = number(0.9, high=1, optional=True)
    post_steps: int = whole(16)
    extra_steps: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Raises `InputError` for a setting out of range."""
        super().__post_init__()
        edits = self.edit_threshold is not None
        object.__setattr__(self, "extra_steps", self.post_steps if edits else 0)

    def open(self, view: View) -> State:
        """Forwards spent since no mask is left."""
        return {"post_steps": torch.zeros_like(view.step)}

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step of blocks [B, L]."""
        predicted = predict(view, output)
        tokens = predicted.tokens
        confidence = predicted.confidence
        promoted = above(view.masked, confidence, self.threshold)
        if self.edit_threshold is None:
            return Decision(tokens, promoted, confidence=confidence), state
        edited = view.decoded & (tokens != view.tokens) & (confidence >= self.edit_threshold)
        was_full = ~view.masked.any(dim=1)
        spent = state["post_steps"] + was_full
        done = (was_full & ~edited.any(dim=1)) | (spent >= self.post_steps)
        decision = Decision(tokens, promoted, revise=edited, done=done, confidence=confidence)
        return decision, {"post_steps": spent}
