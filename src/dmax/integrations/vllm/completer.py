"""vLLM behind `dmax eval`, `dmax distill` and `dmax reproduce`: prompts in, completions out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmax.checkpoint import load_checkpoint
from dmax.completers import Completions, Progress
from dmax.decoding import FALLBACK, get_strategy
from dmax.environment import environment
from dmax.errors import InputError, first_line
from dmax.extras import require
from dmax.integrations.options import PREFIX, SHARED, check_runs_here
from dmax.integrations.vllm import versions
from dmax.models.llada2_moe.configuration import LLaDA2MoeConfig
from dmax.outputs import Cost, FinishReason, GenerationOutput
from dmax.params import AUTO, DecodingParams
from dmax.prompts import Prompt, encode_prompt

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

ENGINE = "vLLM"
FINISH_REASONS: Mapping[str | None, FinishReason] = {"stop": "stop", "length": "length"}
"""What vLLM says of requests that ended as they should."""


class VllmCompleter:
    """vLLM with dmax's plugin, in this process and those that it starts.

    Prompts become token ids as in `dmax.LLM`, and the texts of completions are made from token ids
    as there.

    Args:
        model: a bundled name, a folder, or a hub id, of the architecture of LLaDA-2.x.
        dtype: "auto" (the checkpoint's), or the name of a dtype.
        max_batch_size: sequences decoded together.
        tensor_parallel_size: devices that share the model.
        options: other arguments of `vllm.LLM`.

    Raises:
        InputError: vLLM is missing or of a version that is not served, or as `load_checkpoint`, or
            the model has another architecture, or vLLM refuses the options.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        max_batch_size: int = 16,
        tensor_parallel_size: int = 1,
        **options: Any,
    ) -> None:
        check_engine()
        self.checkpoint = load_checkpoint(model, dtype="auto", device="meta")  # without its weights
        if not isinstance(self.checkpoint.model.config, LLaDA2MoeConfig):
            name = self.checkpoint.model.config.model_type
            raise InputError(
                f"{model} has the architecture {name}, and dmax serves LLaDA-2.x in vLLM",
                hint="decode it with `dmax.LLM`",
            )
        self.name = self.checkpoint.path

        from vllm import LLM

        with refused_by_vllm():
            self._llm = LLM(
                self.name,
                dtype=dtype,
                max_num_seqs=max_batch_size,
                tensor_parallel_size=tensor_parallel_size,
                **options,
            )
        self._engine = self._llm.llm_engine

    def resolve(self, params: DecodingParams) -> DecodingParams:
        """As `Completer.resolve`."""
        if params.strategy != AUTO:
            return params
        return replace(params, strategy=self.checkpoint.decoding or FALLBACK)

    def settings(self, params: DecodingParams) -> dict[str, Any]:
        """As `Completer.settings`; `weights` is a digest of the files."""
        config = self._engine.vllm_config
        record = environment(config.device_config.device)
        record["engine"] = f"{ENGINE} {versions.installed()}"
        record["tensor_parallel_size"] = config.parallel_config.tensor_parallel_size
        return {
            "weights": files_digest(Path(self.name)),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "decoding": repr(get_strategy(params)),
            "block_length": self.checkpoint.special_ids.block_length,
            "batch_size": config.scheduler_config.max_num_seqs,
            "environment": record,
        }

    def encode(self, prompt: Prompt, name: str = "the prompt") -> tuple[int, ...]:
        """Token ids of a prompt, with room for an answer.

        Raises:
            InputError: as `encode_prompt`, or it fills the context.
        """
        ids = encode_prompt(prompt, self.checkpoint, name)
        context = self._engine.model_config.max_model_len
        if len(ids) >= context:
            raise InputError(
                f"{name} has {len(ids)} tokens, and vLLM has room for {context} with the answer",
                hint="shorten the prompt, or raise `max_model_len`",
            )
        return ids

    def completions(
        self, prompts: Sequence[Prompt], params: DecodingParams, progress: Progress
    ) -> Completions:
        """As `Completer.completions`; a group is what finished in a step.

        vLLM has all prompts at once, and fills its batch from them. Those that are not finished end
        when the iterator is closed.
        """
        self._check(params)
        encoded = [self.encode(prompt, f"prompt {at}") for at, prompt in enumerate(prompts)]
        waiting: dict[str, int] = {}
        try:
            with refused_by_vllm():
                for number, ids in enumerate(encoded):
                    name = self._engine.add_request(str(number), tokens(ids), sampling(params))
                    waiting[name] = number
            while waiting:
                ended = [output for output in self._engine.step() if output.finished]
                group = [(int(output.request_id), output) for output in ended]
                numbers = {at for at, _ in group}
                waiting = {name: at for name, at in waiting.items() if at not in numbers}
                progress(len(prompts) - len(waiting), len(prompts))
                if group:
                    yield [(at, self._output(at, output, params)) for at, output in group]
        finally:
            self._engine.abort_request(list(waiting), internal=True)

    def _check(self, params: DecodingParams) -> None:
        """Raise `InputError` for what vLLM cannot do."""
        check_runs_here(get_strategy(params), ENGINE)
        own_length = self.checkpoint.special_ids.block_length
        if params.block_length not in (None, own_length):
            raise InputError(
                f"vLLM decodes blocks of {own_length}, as the checkpoint says, "
                f"got `block_length` {params.block_length}"
            )
        if params.deadline is not None:
            raise InputError("vLLM has no `deadline` for requests", hint="leave it out")

    def _output(
        self, number: int, request: RequestOutput, params: DecodingParams
    ) -> GenerationOutput:
        from dmax.integrations.vllm.metrics import tokens_and_cost

        (completion,) = request.outputs
        reason = FINISH_REASONS.get(completion.finish_reason)
        if reason is None:
            raise InputError(
                f"vLLM ended prompt {number} with {completion.finish_reason!r}: its logits may be "
                "NaN",
                hint="check the checkpoint, or load it with dtype float32",
            )
        ids = tuple(completion.token_ids)
        ends = self.checkpoint.special_ids.eos_token_ids
        if not params.ignore_eos and ids and ids[-1] in ends:
            ids = ids[:-1]
        counted = tokens_and_cost(completion.spec_decode_metrics)
        return GenerationOutput(
            text=self._text(ids, params.stop),
            token_ids=ids,
            prompt_token_ids=tuple(request.prompt_token_ids or ()),
            finish_reason=reason,
            cost=counted[1] if counted else Cost(),
        )

    def _text(self, ids: Sequence[int], stops: Sequence[str]) -> str:
        if self.checkpoint.tokenizer is None:
            return ""
        text = str(self.checkpoint.tokenizer.decode(list(ids), skip_special_tokens=True))
        ends = [text.find(stop) for stop in stops if stop in text]
        return text[: min(ends, default=len(text))]


def check_engine() -> None:
    """Raise `InputError` if vLLM is missing, or of a version that is not served."""
    require("vllm", "vllm", f"decoding in {ENGINE}")
    if said := versions.complaint():
        raise InputError(said)


@contextmanager
def refused_by_vllm() -> Iterator[None]:
    """Raise as `InputError` what vLLM says about arguments and requests."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"vLLM: {first_line(error)}") from error


def tokens(ids: Sequence[int]) -> Any:
    """A prompt in the form that vLLM takes without looking at it again."""
    from vllm.inputs import tokens_input

    return tokens_input(list(ids))


def sampling(params: DecodingParams) -> SamplingParams:
    """How a request is decoded, in the words of vLLM and of the plugin."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=params.max_new_tokens,
        temperature=params.temperature,
        seed=params.seed,
        stop=list(params.stop),
        ignore_eos=params.ignore_eos,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=extra_args(params),
    )


def extra_args(params: DecodingParams) -> dict[str, Any]:
    """The flat options that `request_params` reads as these parameters."""
    shared = {name: getattr(params, name) for name in SHARED}
    return {f"{PREFIX}{name}": value for name, value in (shared | dict(params.options)).items()}


def files_digest(folder: Path) -> str:
    """16 hexadecimal digits that tell weights apart: SHA-256 of the files of a checkpoint."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
