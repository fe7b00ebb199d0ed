"""Writes down how a response is decoded, from what the engine reports after every step."""

from __future__ import annotations

from dmax.outputs import StreamEvent
from dmax.records.trajectories import REMASKED, Trajectory


class Recorder:
    """Follows one request; it must be `provisional`.

    Args:
        prompt_tokens: ids of the prompt.
        block_length: positions of a block.
    """

    def __init__(self, prompt_tokens: int, block_length: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._block_length = block_length
        self._writes: list[list[int]] = []
        self._end = 0  # of the last block that is final

    def see(self, event: StreamEvent) -> None:
        """Note what a step has changed in an open block, or in one that is final by now."""
        end = event.position + len(event.token_ids)
        self._writes += [[] for _ in range(end - len(self._writes))]
        shown = zip(event.token_ids, event.masked, strict=True)
        for writes, (token, is_masked) in zip(
            self._writes[event.position : end], shown, strict=True
        ):
            now = REMASKED if is_masked else token
            before = writes[-1] if writes else REMASKED
            if now != before:
                writes += (event.step, now)
        if event.kind == "committed":
            self._end = end

    def trajectory(self) -> Trajectory:
        """All steps of the final blocks. Blocks that were open when the response ended are not."""
        return Trajectory(
            prompt_tokens=self._prompt_tokens,
            block_length=self._block_length,
            writes=self._writes[: self._end],
        )
