"""`LLM`: text in, text out. Loads a checkpoint, makes requests of prompts and texts of results."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch

from dmax.checkpoint import Checkpoint, load_checkpoint
from dmax.checkpoint_kind import AUTOREGRESSIVE
from dmax.decoding import FALLBACK
from dmax.engine.engine import Engine
from dmax.engine.request import Request
from dmax.engine.thread import Call, EngineThread, Events
from dmax.engine.warm_up import warm_up
from dmax.environment import lacks_compiler, select_device, select_dtype, sum_in_float32
from dmax.errors import InputError, did_you_mean, shorten, show, translated
from dmax.kernels.quant import Format
from dmax.outputs import GenerationOutput, Load, StreamEvent, before_stop
from dmax.params import AUTO, DecodingParams, EngineOptions
from dmax.prompts import TEXTS, Prompt, encode_prompt, split_prompts

logger = logging.getLogger(__name__)


class LLM:
    """A block-diffusion language model ready to generate.

    `generate` and `stream` may be called from any number of threads at once. One thread of its own
    runs the model, requests of all callers share its batch, and each is decoded as it would be
    alone. The thread ends when the object is dropped.

    Args:
        model: a bundled name ("tiny-base", "tiny-dmax"), a folder, or a hub id; of adapters, too,
            which are merged into the base that they name.
        dtype: "auto" (bfloat16 where the hardware has it), or a torch dtype or its name.
        device: "auto", "cpu", "cuda", …
        mask_token_id, eos_token_id, block_length, shift: override what the checkpoint says. One
            that says nothing of diffusion is autoregressive, and writes one token a forward.
        attn_implementation, experts_implementation: as in transformers; None chooses.
        quantization: of the experts, "int8", "fp8" or "int4"; None leaves them as they are.
        options: fields of `dmax.params.EngineOptions`, such as `max_batch_size`, or `warm_up`, with
            which nothing is captured or compiled any more once it is loaded.

    Raises:
        InputError: an unknown model or option, a damaged checkpoint, ids that it does not define,
            or no C++ compiler for `compile_model`.
    """

    @translated()
    def __init__(
        self,
        model: str,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        mask_token_id: int | None = None,
        eos_token_id: int | None = None,
        block_length: int | None = None,
        shift: bool | None = None,
        *,
        attn_implementation: str | None = None,
        experts_implementation: str | None = None,
        quantization: Format | None = None,
        **options: Any,
    ) -> None:
        own = inspect.signature(LLM).parameters
        engine_options = _with_options(EngineOptions(), options, choices=own)
        chosen_device = select_device(device)
        checkpoint = load_checkpoint(
            model,
            dtype=select_dtype(dtype, chosen_device),
            device=chosen_device,
            mask_token_id=mask_token_id,
            eos_token_id=eos_token_id,
            block_length=block_length,
            shift=shift,
            autoregressive=True,
            attn_implementation=attn_implementation,
            experts_implementation=experts_implementation,
            quantization=quantization,
        )
        self._setup(checkpoint, engine_options)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, **options: Any) -> LLM:
        """An `LLM` over a model that is already in memory, such as one in training."""
        llm = cls.__new__(cls)
        llm._setup(checkpoint, _with_options(EngineOptions(), options))
        return llm

    def _setup(self, checkpoint: Checkpoint, options: EngineOptions) -> None:
        if options.compile_model and (missing := lacks_compiler(checkpoint.model.device)):
            raise InputError(
                f"compiling a model takes a C++ compiler, and {missing} is not here",
                hint="install it, or set CXX",
            )
        if options.cuda_graphs and checkpoint.model.device.type != "cuda":
            raise InputError(
                f"`cuda_graphs` takes a CUDA device, and the model is on {checkpoint.model.device}",
                hint="leave it out: steps are captured where that is possible",
            )
        sum_in_float32(checkpoint.model.device)
        checkpoint.model.eval()
        self.checkpoint = checkpoint
        self.model = checkpoint.model
        self.tokenizer = checkpoint.tokenizer
        self.options = options
        self._thread = EngineThread(
            partial(_new_engine, checkpoint, options),
            checkpoint.special_ids.block_length,
            checkpoint.model.device,
        )
        self._has_told = False
        if options.warm_up:
            engine = self.engine()
            warm_up(engine, self.resolve(DecodingParams()))
            self._thread.adopt(engine)

    @translated()
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: DecodingParams | Sequence[DecodingParams] | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[GenerationOutput]:
        """Complete prompts; always a list, in the order of the prompts.

        Args:
            prompts: a text, a list of token ids (an array or tensor [N] too), a list of chat
                messages, or a list of any of these ([M, N] are M prompts). A text is one user
                message if the tokenizer has a chat template (these models are instruction-tuned),
                else it is continued as it is. To continue raw text with a chat model, pass its
                token ids.
            params: one for all, or one for each.
            progress: told how many prompts of how many are finished.

        Raises:
            InputError: a prompt of no known form, one that does not fit the context, or NaN logits.
        """
        requests = self._requests(prompts, params)
        outputs: dict[int, GenerationOutput] = {}
        with self.submit(requests) as call:
            for event in call:
                if event.kind == "finished":
                    outputs[event.index] = self.output(requests[event.index], event)
                    progress(len(outputs), len(requests))
        return [outputs[index] for index in range(len(requests))]

    def stream(self, prompt: Prompt, params: DecodingParams | None = None) -> Iterator[StreamEvent]:
        """Complete one prompt, event by event; the last one is "finished" and carries the output.

        The request begins with the first event that is asked for. It is decoded as fast as it can
        be, however slowly its events are read. A stream that is closed or dropped cancels it.

        Raises:
            InputError: as `generate`.
        """
        with translated():
            request = self.request(0, prompt, DecodingParams() if params is None else params)
            with self.submit([replace(request, provisional=True)]) as call:
                for event in call:
                    yield self.event(request, event)

    def submit(self, requests: Sequence[Request], events: Events | None = None) -> Call:
        """Queue requests together, for servers and others who do not wait for each in turn.

        `request` makes them, `event` and `output` add text to what comes of them.

        Args:
            requests: no two with the same `index`.
            events: takes the events in place of the call; its `put` runs in the model's thread.

        Raises:
            RuntimeError: the model was closed.
        """
        return self._thread.submit(requests, events)

    def load(self) -> Load:
        """How many requests are decoded now, and how many wait."""
        return self._thread.load()

    def close(self) -> None:
        """End the model's thread; requests in progress raise `RuntimeError`, as do later ones."""
        self._thread.close()

    def encode(self, prompt: Prompt, *, raw: bool = False) -> tuple[int, ...]:
        """Token ids of a prompt of any form, the chat template applied to messages and texts.

        Args:
            prompt: as `generate` takes it.
            raw: leave the chat template out of texts, which are then continued as they are.

        Raises:
            InputError: as `dmax.prompts.encode_prompt`.
        """
        return encode_prompt(prompt, self.checkpoint, raw=raw)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special ones left out; empty without a tokenizer."""
        if self.tokenizer is None:
            return ""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def request(self, index: int, prompt: Prompt, params: DecodingParams) -> Request:
        """A request for an engine; `index` is the caller's number for it.

        Raises:
            InputError: a prompt of no known form, settings that the strategy does not take, or a
                strategy that does not go with this model.
        """
        if not isinstance(params, DecodingParams):
            raise InputError(
                f"`params` must be a `DecodingParams` or a list of them, got {show(params)}"
            )
        if params.stop and self.tokenizer is None:
            raise InputError(
                "this checkpoint has no tokenizer to find stop texts with", hint="leave out `stop`"
            )
        find_stop = partial(self._find_stop, params.stop) if params.stop else None
        if params.block_length not in (None, 1) and self.checkpoint.decoding == AUTOREGRESSIVE:
            raise InputError(
                f"this model writes one token a forward, and no blocks of {params.block_length}",
                hint="leave out `block_length`, or make it a diffusion model with `dmax convert`",
            )
        prompt_ids = encode_prompt(prompt, self.checkpoint, f"prompt {index}")
        request = Request(index, prompt_ids, self.resolve(params), find_stop)
        request.strategy.check_weights(self.model.named_parameters())
        return request

    def resolve(self, params: DecodingParams) -> DecodingParams:
        """The same settings with the strategy of this checkpoint in place of "auto".

        A checkpoint that names none is decoded by threshold, and a line in the log says so.
        """
        if params.strategy != AUTO:
            return params
        named = self.checkpoint.decoding
        if named is None and not self._has_told:
            self._has_told = True
            logger.warning(
                "%s does not say which decoding it was trained for: using `%s`; "
                "choose another with `strategy`",
                self.checkpoint.path or "the model",
                FALLBACK,
            )
        return replace(params, strategy=named or FALLBACK)

    def engine(self, block_length: int | None = None, **options: Any) -> Engine:
        """A new engine over this model, for those who take its steps themselves, in one thread.

        `request` makes requests for it, `event` and `output` add text to what it gives.

        Args:
            block_length: None: the checkpoint's.
            options: fields of `EngineOptions` that differ from this object's own.
        """
        engine_options = _with_options(self.options, options)
        return _new_engine(self.checkpoint, engine_options, block_length)

    def event(self, request: Request, event: StreamEvent) -> StreamEvent:
        """An event of an engine with its text; raises the error of a request that failed."""
        if event.kind == "finished":
            output = self.output(request, event)
            return replace(event, text=output.text, output=output)
        eos = self.checkpoint.special_ids.eos_token_ids
        positions = zip(event.token_ids, event.masked, strict=True)
        before_eos = takewhile(lambda position: position[0] not in eos, positions)
        decoded = [token for token, is_masked in before_eos if not is_masked]
        return replace(event, text=self.decode(decoded))

    def output(self, request: Request, event: StreamEvent) -> GenerationOutput:
        """The output of a "finished" event with its text; raises the error of one that failed."""
        if event.error is not None:
            raise event.error
        assert event.output is not None, "only finished requests have an output"
        text = self.decode(event.output.token_ids)
        return replace(event.output, text=before_stop(text, request.params.stop))

    def _requests(self, prompts: Any, params: Any) -> list[Request]:
        prompts = split_prompts(prompts)
        each = params
        if not isinstance(params, Sequence) or isinstance(params, TEXTS):
            each = [DecodingParams() if params is None else params] * len(prompts)
        if len(each) != len(prompts):
            raise InputError(
                "`params` must be one for all prompts or a list of one for each, "
                f"got a list of {len(each)}; the number of prompts is {len(prompts)}"
            )
        return list(map(self.request, range(len(prompts)), prompts, each))

    def _find_stop(self, texts: Sequence[str], token_ids: Sequence[int]) -> int | None:
        """How many tokens to keep so that their text ends in a stop text; None without one."""

        def has_stop(num: int) -> bool:
            text = self.decode(token_ids[:num])
            return any(stop in text for stop in texts)

        if not has_stop(len(token_ids)):
            return None
        return next(num for num in range(1, len(token_ids) + 1) if has_stop(num))


def _with_options(
    options: EngineOptions, changes: Mapping[str, Any], choices: Iterable[str] = ()
) -> EngineOptions:
    """The options with some of them changed; a hint also names `choices`, what else there is."""
    known = [entry.name for entry in fields(EngineOptions)]
    for name in changes:
        if name not in known:
            raise InputError(
                f"there is no option `{shorten(name)}`",
                did_you_mean(name, (*known, *choices)) or f"there are {', '.join(known)}",
            )
    return replace(options, **changes)


def _new_engine(checkpoint: Checkpoint, options: EngineOptions, block_length: int | None) -> Engine:
    """An engine over a model; None stands for the checkpoint's own block length."""
    special_ids = checkpoint.special_ids
    if block_length not in (None, special_ids.block_length):
        special_ids = replace(special_ids, block_length=block_length)
    return Engine(checkpoint.model, special_ids, options)
