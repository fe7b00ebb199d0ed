"""What a replica does: load a model, say what its results depend on, answer prompts.

Nothing here knows Ray. A worker is made in the process of its replica, from a `Model` that travels
there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol, cast

from dmax.completers import Completer, LocalCompleter
from dmax.distill.engine import CompleterAnswerer
from dmax.distill.responses import Answer, Answerer
from dmax.errors import InputError
from dmax.outputs import GenerationOutput
from dmax.params import DecodingParams

Engine = Literal["dmax", "vllm"]
Numbered = Sequence[tuple[int, Any]]
"""Prompts, or what came of them, with their numbers."""

KEPT = 8  # descriptions, each of which reads all weights


@dataclass(frozen=True, slots=True)
class Model:
    """What a replica loads.

    Attributes:
        name: a bundled name, a folder or a hub id.
        engine: who decodes.
        gpus: of a replica; vLLM divides the model among them.
        batch_size: sequences decoded together.
        dtype: of the weights.
        device: of dmax's own engine.
        quantization: of its experts.
        compile_model: whether it compiles the model.

    Raises:
        InputError: settings that the engine does not have.
    """

    name: str
    engine: Engine = "dmax"
    gpus: int = 0
    batch_size: int = 64
    dtype: str = "auto"
    device: str = "auto"
    quantization: str | None = None
    compile_model: bool = False

    def __post_init__(self) -> None:
        if self.engine == "dmax" and self.gpus > 1:
            raise InputError(
                f"dmax's own engine decodes on one GPU, got --gpus-per-replica {self.gpus}",
                hint="--engine vllm divides a model among several",
            )
        if self.device == "cpu" and self.gpus:
            raise InputError(
                f"a replica on --device cpu takes no GPU, got --gpus-per-replica {self.gpus}",
                hint="leave out one of the two",
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise InputError(
                f"`--device` must be auto, cpu or cuda for a replica, got {self.device}",
                hint="Ray gives each replica a GPU of its own",
            )
        if self.engine == "vllm" and (self.quantization or self.compile_model):
            raise InputError("`--quantization` and `--compile` are of dmax's own engine")

    def completer(self) -> Completer:
        """The model, loaded.

        Raises:
            InputError: it cannot be.
        """
        if self.engine == "vllm":
            from dmax.integrations.vllm.completer import VllmCompleter

            return VllmCompleter(
                self.name,
                dtype=self.dtype,
                max_batch_size=self.batch_size,
                tensor_parallel_size=max(1, self.gpus),
            )
        from dmax.llm import LLM

        return LocalCompleter(
            LLM(
                self.name,
                dtype=self.dtype,
                device=self.device if self.gpus else "cpu",
                quantization=cast(Any, self.quantization),
                max_batch_size=self.batch_size,
                compile_model=self.compile_model,
            )
        )


@dataclass(frozen=True, slots=True)
class Description:
    """What the results of a replica depend on.

    Attributes:
        params: with the strategy of the checkpoint in place of "auto".
        settings: as `Completer.settings` or `Answerer.settings` gives them.
    """

    params: DecodingParams
    settings: dict[str, Any]

    def compared(self) -> dict[str, Any]:
        """The settings that must be the same for all replicas; their machines may differ."""
        return {name: value for name, value in self.settings.items() if name != "environment"}


class Worker(Protocol):
    """What works in a replica."""

    def describe(self, params: DecodingParams) -> Description:
        """What results depend on."""

    def work(self, prompts: Numbered, params: DecodingParams) -> Numbered:
        """What comes of prompts, each with its number.

        Raises:
            InputError: nothing can.
        """


class Completing:
    """A worker that completes prompts, for evaluation."""

    def __init__(self, model: Model) -> None:
        self._completer = model.completer()
        self.describe = lru_cache(KEPT)(self._describe)

    def _describe(self, params: DecodingParams) -> Description:
        resolved = self._completer.resolve(params)
        return Description(resolved, self._completer.settings(resolved))

    def work(self, prompts: Numbered, params: DecodingParams) -> list[tuple[int, GenerationOutput]]:
        """Completions; raises `InputError` if one of the prompts cannot be completed."""
        texts = [prompt for _, prompt in prompts]
        groups = self._completer.completions(texts, params, lambda done, total: None)
        return [(prompts[at][0], output) for group in groups for at, output in group]


class Answering:
    """A worker that answers prompts, for distillation; a prompt that it refuses is an answer."""

    def __init__(self, model: Model) -> None:
        self._completer = model.completer()
        self.describe = lru_cache(KEPT)(self._describe)

    def _answerer(self, params: DecodingParams) -> Answerer:
        from dmax.distill.model import ModelAnswerer

        if isinstance(self._completer, LocalCompleter):
            return ModelAnswerer(self._completer.llm, params)
        check = getattr(self._completer, "encode", lambda chat: None)
        return CompleterAnswerer(self._completer, params, check)

    def _describe(self, params: DecodingParams) -> Description:
        return Description(self._completer.resolve(params), self._answerer(params).settings())

    def work(self, prompts: Numbered, params: DecodingParams) -> list[tuple[int, Answer]]:
        """Answers and refusals."""
        numbers = [number for number, _ in prompts]
        groups = self._answerer(params).answers(dict(prompts), numbers)
        return [each for group in groups for each in group]
