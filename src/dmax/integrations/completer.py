"""What stands behind `dmax eval`, `dmax distill` and `dmax reproduce` when another engine decodes.

Prompts become token ids as in `dmax.LLM`, and the texts of completions are made from token ids as
there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from dmax.checkpoint import load_checkpoint
from dmax.decoding import FALLBACK, get_strategy
from dmax.environment import environment
from dmax.errors import InputError, first_line
from dmax.integrations.options import PREFIX, SHARED, check_reading, check_runs_here
from dmax.models.llada2_moe.configuration import LLaDA2MoeConfig
from dmax.outputs import Cost, FinishReason, GenerationOutput, before_stop
from dmax.params import AUTO, DecodingParams
from dmax.prompts import Prompt, encode_prompt

FINISH_REASONS: Mapping[str | None, FinishReason] = {"stop": "stop", "length": "length"}
"""What engines say of requests that ended as they should."""


class EngineCompleter:
    """A `Completer` over an engine; derive from it and start the engine.

    Args:
        model: a bundled name, a folder, or a hub id, of the architecture of LLaDA-2.x.

    Attributes:
        engine: its name.
        checkpoint: without its weights.
        name: the folder of the model.

    Raises:
        InputError: as `load_checkpoint`, or the model has another architecture or `shift`.
    """

    engine: ClassVar[str]

    def __init__(self, model: str) -> None:
        self.checkpoint = load_checkpoint(model, dtype="auto", device="meta")
        if not isinstance(self.checkpoint.model.config, LLaDA2MoeConfig):
            name = self.checkpoint.model.config.model_type
            raise InputError(
                f"{model} has the architecture {name}, and dmax serves LLaDA-2.x in {self.engine}",
                hint="decode it with `dmax.LLM`",
            )
        check_reading(self.checkpoint.model.config, self.engine)
        self.name = self.checkpoint.path

    def resolve(self, params: DecodingParams) -> DecodingParams:
        """As `Completer.resolve`."""
        if params.strategy != AUTO:
            return params
        return replace(params, strategy=self.checkpoint.decoding or FALLBACK)

    def record(
        self,
        params: DecodingParams,
        *,
        version: str | None,
        device: Any,
        dtype: object,
        max_batch_size: int,
        tensor_parallel_size: int,
    ) -> dict[str, Any]:
        """What `Completer.settings` gives; `weights` is a digest of the files.

        Args:
            params: as there.
            version: of the engine.
            device: where it computes.
            dtype: in which.
            max_batch_size: sequences that it decodes together.
            tensor_parallel_size: devices that share its model.
        """
        return {
            "weights": files_digest(Path(self.name)),
            "dtype": str(dtype).removeprefix("torch."),
            "decoding": repr(get_strategy(params)),
            "block_length": self.checkpoint.special_ids.block_length,
            "batch_size": max_batch_size,
            "environment": {
                **environment(device),
                "engine": f"{self.engine} {version}",
                "tensor_parallel_size": tensor_parallel_size,
            },
        }

    def encode_within(self, prompt: Prompt, name: str, context: int) -> tuple[int, ...]:
        """Token ids of a prompt, with room for an answer.

        Args:
            prompt: in any form that `dmax.LLM` takes.
            name: what errors call it.
            context: positions that the engine has for prompt and answer.

        Raises:
            InputError: as `encode_prompt`, or it fills the context.
        """
        ids = encode_prompt(prompt, self.checkpoint, name)
        if len(ids) >= context:
            raise InputError(
                f"{name} has {len(ids)} tokens, and {self.engine} has room for {context} with the "
                "answer",
                hint="shorten the prompt, or give the engine a longer context",
            )
        return ids

    def check(self, params: DecodingParams) -> None:
        """Raise `InputError` for what the engine cannot do."""
        check_runs_here(get_strategy(params), self.engine)
        own_length = self.checkpoint.special_ids.block_length
        if params.block_length not in (None, own_length):
            raise InputError(
                f"{self.engine} decodes blocks of {own_length}, as the checkpoint says, "
                f"got `block_length` {params.block_length}"
            )
        if params.deadline is not None:
            raise InputError(f"{self.engine} has no `deadline` for requests", hint="leave it out")

    def output(
        self,
        number: int,
        prompt_ids: Sequence[int],
        token_ids: Sequence[int],
        reason: str | None,
        cost: Cost,
        params: DecodingParams,
    ) -> GenerationOutput:
        """A completion, cut at its EOS and with its text.

        Args:
            number: of the prompt.
            prompt_ids: the prompt.
            token_ids: what the engine has generated.
            reason: why it ended, in the engine's words.
            cost: what it took.
            params: how it was decoded.

        Raises:
            InputError: it did not end as it should.
        """
        finish_reason = FINISH_REASONS.get(reason)
        if finish_reason is None:
            raise InputError(
                f"{self.engine} ended prompt {number} with {reason!r}: its logits may be NaN",
                hint="check the checkpoint, or load it with dtype float32",
            )
        ids = tuple(token_ids)
        ends = self.checkpoint.special_ids.eos_token_ids
        if not params.ignore_eos and ids and ids[-1] in ends:
            ids = ids[:-1]
        text = self._text(ids, params.stop)
        return GenerationOutput(text, ids, tuple(prompt_ids), finish_reason, cost)

    def _text(self, ids: Sequence[int], stops: Sequence[str]) -> str:
        if self.checkpoint.tokenizer is None:
            return ""
        text = str(self.checkpoint.tokenizer.decode(list(ids), skip_special_tokens=True))
        return before_stop(text, stops)


@contextmanager
def refused_by(engine: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raise as `InputError` what an engine says about its arguments and requests.

    Args:
        engine: what the error calls the engine.
        kinds: errors in which it says so, besides `ValueError`.
    """
    refusals: tuple[type[Exception], ...] = (ValueError, *kinds)
    try:
        yield
    except InputError:
        raise
    except refusals as error:
        raise InputError(f"{engine}: {first_line(error)}") from error


def flat_options(params: DecodingParams) -> dict[str, Any]:
    """The flat options that `dmax.integrations.options.request_params` reads as these."""
    shared = {name: getattr(params, name) for name in SHARED}
    return {f"{PREFIX}{name}": value for name, value in (shared | dict(params.options)).items()}


def files_digest(folder: Path) -> str:
    """16 hexadecimal digits that tell weights apart: SHA-256 of the files of a checkpoint."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
