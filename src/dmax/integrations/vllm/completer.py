"""vLLM behind `dmax eval`, `dmax distill` and `dmax reproduce`: prompts in, completions out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dmax.completers import Completions, Progress
from dmax.errors import InputError
from dmax.extras import require
from dmax.integrations.completer import EngineCompleter, flat_options, refused_by
from dmax.integrations.vllm import versions
from dmax.outputs import Cost, GenerationOutput
from dmax.params import DecodingParams
from dmax.prompts import Prompt

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

ENGINE = "vLLM"


class VllmCompleter(EngineCompleter):
    """vLLM with dmax's plugin, in this process and those that it starts.

    Args:
        model: a bundled name, a folder, or a hub id, of the architecture of LLaDA-2.x.
        dtype: "auto" (the checkpoint's), or the name of a dtype.
        max_batch_size: sequences decoded together.
        tensor_parallel_size: devices that share the model.
        options: other arguments of `vllm.LLM`.

    Raises:
        InputError: vLLM is missing or of a version that is not served, or as `EngineCompleter`, or
            vLLM refuses the options.
    """

    engine = ENGINE

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
        super().__init__(model)

        from vllm import LLM

        with refused_by(ENGINE):
            self._llm = LLM(
                self.name,
                dtype=dtype,
                max_num_seqs=max_batch_size,
                tensor_parallel_size=tensor_parallel_size,
                **options,
            )
        self._engine = self._llm.llm_engine

    def close(self) -> None:
        """End the processes of vLLM, and free its memory for another model."""
        self._engine.engine_core.shutdown()

    def settings(self, params: DecodingParams) -> dict[str, Any]:
        """As `Completer.settings`."""
        config = self._engine.vllm_config
        return self.record(
            params,
            version=versions.installed(),
            device=config.device_config.device,
            dtype=config.model_config.dtype,
            max_batch_size=config.scheduler_config.max_num_seqs,
            tensor_parallel_size=config.parallel_config.tensor_parallel_size,
        )

    def encode(self, prompt: Prompt, name: str = "the prompt") -> tuple[int, ...]:
        """As `EngineCompleter.encode_within`, within the context that vLLM was given."""
        return self.encode_within(prompt, name, self._engine.model_config.max_model_len)

    def completions(
        self, prompts: Sequence[Prompt], params: DecodingParams, progress: Progress
    ) -> Completions:
        """As `Completer.completions`; a group is what finished in a step.

        vLLM has all prompts at once, and fills its batch from them. Those that are not finished end
        when the iterator is closed.
        """
        self.check(params)
        encoded = [self.encode(prompt, f"prompt {at}") for at, prompt in enumerate(prompts)]
        waiting: dict[str, int] = {}

        from vllm.exceptions import VLLMClientError

        try:
            with refused_by(ENGINE, VLLMClientError):
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

    def _output(
        self, number: int, request: RequestOutput, params: DecodingParams
    ) -> GenerationOutput:
        from dmax.integrations.vllm.metrics import tokens_and_cost

        (completion,) = request.outputs
        counted = tokens_and_cost(completion.spec_decode_metrics)
        return self.output(
            number,
            request.prompt_token_ids or (),
            completion.token_ids,
            completion.finish_reason,
            counted[1] if counted else Cost(),
            params,
        )


def check_engine() -> None:
    """Raise `InputError` if vLLM is missing, or of a version that is not served."""
    require("vllm", "vllm", f"decoding in {ENGINE}")
    if said := versions.complaint():
        raise InputError(said)


def tokens(ids: Sequence[int]) -> Any:
    """A prompt in the form that vLLM takes without looking at it again."""
    from vllm.inputs import tokens_input

    return tokens_input(list(ids))


def sampling(params: DecodingParams) -> SamplingParams:
    """How a request is decoded, in the words of vLLM and of the plugin."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    seed = params.seed
    if seed is None and params.temperature > 0:  # temperature 1 alone would mean that nobody chose
        seed = random.randrange(2**63)
    return SamplingParams(
        max_tokens=params.max_new_tokens,
        temperature=params.temperature,
        seed=seed,
        stop=list(params.stop),
        ignore_eos=params.ignore_eos,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=flat_options(params),
    )
