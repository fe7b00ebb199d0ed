"""SGLang behind `dmax eval`, `dmax distill` and `dmax reproduce`: prompts in, completions out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from dmax.completers import Completions, Progress
from dmax.errors import InputError
from dmax.extras import require
from dmax.integrations.completer import EngineCompleter, flat_options, refused_by
from dmax.integrations.sglang import SUPPORTED
from dmax.integrations.sglang.checkpoint import ENGINE
from dmax.integrations.sglang.requests import COSTS
from dmax.integrations.versions import complaint
from dmax.outputs import Cost, GenerationOutput
from dmax.params import DecodingParams
from dmax.prompts import Prompt


class SglangCompleter(EngineCompleter):
    """SGLang with dmax's plugin, in processes that this one starts.

    SGLang ends all processes that were started from here when it shuts down, its own or not.

    Args:
        model: a bundled name, a folder, or a hub id, of the architecture of LLaDA-2.x.
        dtype: "auto" (the checkpoint's), or the name of a dtype.
        max_batch_size: sequences decoded together.
        tensor_parallel_size: devices that share the model.
        options: other arguments of `sglang.Engine`.

    Raises:
        InputError: SGLang is missing or of a release that is not served, or as `EngineCompleter`,
            or SGLang refuses the options.
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

        from sglang import Engine

        with refused_by(ENGINE):
            self._engine = Engine(
                model_path=self.name,
                dtype=dtype,
                max_running_requests=max_batch_size,
                tp_size=tensor_parallel_size,
                **options,
            )
        self._max_batch_size = max_batch_size
        self._tensor_parallel_size = tensor_parallel_size

    def close(self) -> None:
        """End the processes of SGLang, and free its memory for another model."""
        self._engine.shutdown()

    def settings(self, params: DecodingParams) -> dict[str, Any]:
        """As `Completer.settings`."""
        from sglang import __version__

        manager = self._engine.tokenizer_manager
        return self.record(
            params,
            version=__version__,
            device=manager.server_args.device,
            dtype=manager.model_config.dtype,
            max_batch_size=self._max_batch_size,
            tensor_parallel_size=self._tensor_parallel_size,
        )

    def encode(self, prompt: Prompt, name: str = "the prompt") -> tuple[int, ...]:
        """As `EngineCompleter.encode_within`, within what SGLang leaves for prompts."""
        longest = self._engine.tokenizer_manager.max_req_input_len
        return self.encode_within(prompt, name, longest)

    def completions(
        self, prompts: Sequence[Prompt], params: DecodingParams, progress: Progress
    ) -> Completions:
        """As `Completer.completions`; a group is what has finished together.

        SGLang has all prompts at once, and fills its batch from them. Those that are not finished
        end when the iterator is closed.
        """
        self.check(params)
        encoded = [self.encode(prompt, f"prompt {at}") for at, prompt in enumerate(prompts)]
        loop = self._engine.loop
        call = uuid4().hex
        names = [f"{call}-{number}" for number in range(len(prompts))]
        tasks = {
            loop.create_task(self._answer(name, ids, params)): number
            for number, (name, ids) in enumerate(zip(names, encoded, strict=True))
        }
        waiting = set(tasks)
        try:
            while waiting:
                first = asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                done, waiting = loop.run_until_complete(first)
                progress(len(prompts) - len(waiting), len(prompts))
                group = [(tasks[task], task.result()) for task in done]
                yield [
                    (number, self._output(number, encoded[number], answer, params))
                    for number, answer in group
                ]
        finally:
            for task in waiting:
                self._engine.tokenizer_manager.abort_request(names[tasks[task]])
            loop.run_until_complete(asyncio.gather(*waiting, return_exceptions=True))

    async def _answer(
        self, name: str, ids: Sequence[int], params: DecodingParams
    ) -> Mapping[str, Any]:
        from fastapi import HTTPException

        try:
            with refused_by(ENGINE):
                found: Mapping[str, Any] = await self._engine.async_generate(
                    input_ids=list(ids), sampling_params=sampling(params), rid=name
                )
        except HTTPException as error:  # how SGLang ends a request that cannot go on
            raise InputError(f"{ENGINE}: {error.detail}") from error
        return found

    def _output(
        self,
        number: int,
        prompt_ids: Sequence[int],
        answer: Mapping[str, Any],
        params: DecodingParams,
    ) -> GenerationOutput:
        told = answer["meta_info"]
        counts = {name: told[f"dmax_{name}"][-1] for name in COSTS if told.get(f"dmax_{name}")}
        reason = told["finish_reason"]["type"]
        ids = answer["output_ids"]
        return self.output(number, prompt_ids, ids, reason, Cost(**counts), params)


def check_engine() -> None:
    """Raise `InputError` if SGLang is missing, or of a release that is not served."""
    require("sglang", "sglang", f"decoding in {ENGINE}")
    if said := complaint("sglang", SUPPORTED):
        raise InputError(said)


def sampling(params: DecodingParams) -> dict[str, Any]:
    """How a request is decoded, in the words of SGLang and of the plugin."""
    return {
        "max_new_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "sampling_seed": params.seed,
        "stop": list(params.stop),
        "ignore_eos": params.ignore_eos,
        "custom_params": flat_options(params),
    }
