"""Who completes prompts: a model in this process, replicas of it, or another engine.

What measures and compares models stands on `Completer`, so that it does not ask who decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from dmax.decoding import get_strategy
from dmax.environment import environment, weights_digest
from dmax.outputs import GenerationOutput
from dmax.params import DecodingParams

if TYPE_CHECKING:
    from dmax.llm import LLM
    from dmax.prompts import Prompt

Completions = Generator[list[tuple[int, GenerationOutput]], None, None]
"""Groups of finished prompts: the number of each, and its completion. Closing it ends the rest."""
Progress = Callable[[int, int], None]
"""Told how many of how many are finished."""

CHUNK_BATCHES = 4  # batches that are decoded before their completions are given


class Completer(Protocol):
    """What completes prompts.

    Attributes:
        name: of its model, as the user gave it.
    """

    name: str

    def resolve(self, params: DecodingParams) -> DecodingParams:
        """The same settings with the strategy of the checkpoint in place of "auto"."""

    def settings(self, params: DecodingParams) -> dict[str, Any]:
        """What figures depend on, by the names of the fields of `evaluation.run.Summary`.

        These are `weights`, `dtype`, `decoding`, `block_length`, `batch_size` and `environment`.

        Args:
            params: how it decodes, with a strategy other than "auto".
        """

    def completions(
        self, prompts: Sequence[Prompt], params: DecodingParams, progress: Progress
    ) -> Completions:
        """Complete all prompts; a group of them is given as soon as it is finished.

        Raises:
            InputError: a prompt that cannot be completed, or nothing can be any more.
        """


class LocalCompleter:
    """A model in this process."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.name = llm.checkpoint.path

    @cached_property
    def _digest(self) -> str:
        """Of the weights; taking it from 16 billion parameters lasts minutes."""
        return weights_digest(self.llm.model)

    def resolve(self, params: DecodingParams) -> DecodingParams:
        """As `Completer.resolve`."""
        return self.llm.resolve(params)

    def settings(self, params: DecodingParams) -> dict[str, Any]:
        """As `Completer.settings`."""
        llm = self.llm
        model = llm.model
        return {
            "weights": self._digest,
            "dtype": str(model.dtype).removeprefix("torch."),
            "decoding": repr(get_strategy(params)),
            "block_length": params.block_length or llm.checkpoint.special_ids.block_length,
            "batch_size": llm.options.max_batch_size,
            "environment": environment(model.device) | {"compiled": llm.options.compile_model},
        }

    def completions(
        self, prompts: Sequence[Prompt], params: DecodingParams, progress: Progress
    ) -> Completions:
        """As `Completer.completions`; a group is a few batches."""
        size = CHUNK_BATCHES * self.llm.options.max_batch_size
        for start in range(0, len(prompts), size):
            so_far = after(start, len(prompts), progress)
            outputs = self.llm.generate(prompts[start : start + size], params, so_far)
            yield list(enumerate(outputs, start))


def after(before: int, total: int, progress: Progress) -> Progress:
    """Progress of one part among several, of which others have finished `before` already."""
    return lambda done, _: progress(before + done, total)
