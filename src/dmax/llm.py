"""`LLM`: text in, text out. Loads a checkpoint, turns prompts into requests and completions into outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, get_args

import torch

from dmax.checkpoint import Checkpoint, load_checkpoint
from dmax.decoding import get_strategy
from dmax.engine.engine import Commit, Engine
from dmax.engine.prefix import PrefixCache
from dmax.engine.request import BlockEvent, Completion, Request
from dmax.environment import lacks_compiler, select_device, select_dtype
from dmax.errors import InputError
from dmax.kernels.quant import Format
from dmax.outputs import GenerationOutput, StreamEvent
from dmax.params import DecodingParams, check_number

Message = Mapping[str, str]
Prompt = str | Sequence[int] | Sequence[Message]


class LLM:
    """A block-diffusion language model ready to generate.

    Args:
        model: a bundled name ("tiny-base", "tiny-dmax"), a folder, or a hub id.
        dtype: "auto" (bfloat16 where the hardware has it), or a torch dtype or its name.
        device: "auto", "cpu", "cuda", …
        mask_token_id, eos_token_id, block_length: override what the checkpoint says.
        max_batch_size: sequences decoded together; more wait their turn.
        prefix_cache_mib: memory for prompts' leading blocks that are encoded once for all requests
            that begin alike;
            0: none, so that a result's last bits do not depend on what was decoded before.
        commit: how finished blocks get their clean keys and values (see `Engine`).
        attn_implementation, experts_implementation: as in transformers; None chooses.
        quantization: of the experts, "int8", "fp8" or "int4"; None leaves them as they are.
        compile_model: have `torch.compile` fuse the small operations of a forward. The first two
            forwards take half a minute longer, which long jobs earn back (docs/performance.md); on
            a CPU it takes a C++ compiler.

    Raises:
        InputError: an unknown model, a damaged checkpoint, ids that it does not define, or no C++
            compiler.
    """

    def __init__(
        self,
        model: str,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        mask_token_id: int | None = None,
        eos_token_id: int | None = None,
        block_length: int | None = None,
        *,
        max_batch_size: int = 16,
        prefix_cache_mib: int = 0,
        commit: Commit = "cross_block",
        attn_implementation: str | None = None,
        experts_implementation: str | None = None,
        quantization: Format | None = None,
        compile_model: bool = False,
    ) -> None:
        place, _ = select_device(device)
        kind, _ = select_dtype(dtype, place)
        checkpoint = load_checkpoint(
            model,
            dtype=kind,
            device=place,
            mask_token_id=mask_token_id,
            eos_token_id=eos_token_id,
            block_length=block_length,
            attn_implementation=attn_implementation,
            experts_implementation=experts_implementation,
            quantization=quantization,
        )
        self._setup(checkpoint, max_batch_size, prefix_cache_mib, commit, compile_model)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        max_batch_size: int = 16,
        prefix_cache_mib: int = 0,
        commit: Commit = "cross_block",
        compile_model: bool = False,
    ) -> LLM:
        """An `LLM` over a model that is already in memory, such as one in training."""
        llm = cls.__new__(cls)
        llm._setup(checkpoint, max_batch_size, prefix_cache_mib, commit, compile_model)
        return llm

    def _setup(
        self,
        checkpoint: Checkpoint,
        max_batch_size: int,
        prefix_cache_mib: int,
        commit: Commit,
        compile_model: bool,
    ) -> None:
        check_number("max_batch_size", max_batch_size, low=1, whole=True)
        check_number("prefix_cache_mib", prefix_cache_mib, low=0, whole=True)
        if commit not in get_args(Commit):
            raise InputError(
                f"`commit` must be one of {', '.join(get_args(Commit))}, got {commit!r}"
            )
        if compile_model and (name := lacks_compiler(checkpoint.model.device)):
            raise InputError(
                f"compiling a model takes a C++ compiler, and {name} is not here",
                "install it, or set CXX",
            )
        checkpoint.model.eval()
        self.checkpoint = checkpoint
        self.model = checkpoint.model
        self.tokenizer = checkpoint.tokenizer
        self.max_batch_size = max_batch_size
        self.prefix_cache_mib = prefix_cache_mib
        self.commit = commit
        self.compile_model = compile_model
        self._engines: dict[int, Engine] = {}  # by block length

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: DecodingParams | Sequence[DecodingParams] | None = None,
    ) -> list[GenerationOutput]:
        """Complete prompts; always a list, in the order of the prompts.

        Args:
            prompts: a text, a list of token ids, a list of chat messages, or a list of any of
                these. A text is one user message if the tokenizer has a chat template (these models
                are instruction-tuned), else it is continued as it is; to continue raw text with a
                chat model, pass its token ids.
            params: one for all, or one for each.

        Raises:
            InputError: a prompt of no known form, one that does not fit the context, or NaN logits.
        """
        requests = self._requests(prompts, params)
        outputs: list[GenerationOutput | None] = [None] * len(requests)
        groups = [
            (self._engine(length), group)
            for length, group in self._by_block_length(requests).items()
        ]
        for engine, group in groups:
            engine.check(group)  # of all groups, before the first is decoded
        for engine, group in groups:
            for event in engine.run(group):
                if event.kind == "finished":
                    outputs[event.index] = self._output(requests[event.index], event.completion)
        return [output for output in outputs if output is not None]

    def stream(self, prompt: Prompt, params: DecodingParams | None = None) -> Iterator[StreamEvent]:
        """Complete one prompt, event by event; the last event is "finished" and carries the output.

        Raises:
            InputError: as `generate`.
        """
        (request,) = self._requests([prompt], params)
        engine = self._engine(
            request.params.block_length or self.checkpoint.special_ids.block_length
        )
        for event in engine.run([request], provisional=True):
            if event.kind == "finished":
                output = self._output(request, event.completion)
                yield StreamEvent("finished", output.text, output.token_ids, output=output)
            else:
                yield self._stream_event(event)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt of any form, the chat template applied to messages and texts."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError(
                    "this checkpoint has no tokenizer", hint="pass prompts as lists of token ids"
                )
            if not self.tokenizer.chat_template:
                return tuple(self.tokenizer.encode(prompt))
            prompt = [{"role": "user", "content": prompt}]
        is_list = isinstance(prompt, Sequence)
        if is_list and prompt and all(isinstance(message, Mapping) for message in prompt):
            if self.tokenizer is None or not self.tokenizer.chat_template:
                raise InputError(
                    "this checkpoint has no chat template", hint="pass texts or lists of token ids"
                )
            messages: list[dict[str, str]] = [dict(message) for message in prompt]  # type: ignore[arg-type]
            if not all({"role", "content"} <= message.keys() for message in messages):
                raise InputError("a chat message is a mapping with `role` and `content`")
            ids = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
            return tuple(ids)
        if is_list and all(
            isinstance(token, int) and not isinstance(token, bool) for token in prompt
        ):
            return tuple(prompt)  # type: ignore[arg-type]
        raise InputError(
            f"a prompt must be a text, a list of token ids or a list of chat messages, got {prompt!r:.80}",
            hint="a message is a mapping with `role` and `content`",
        )

    def _requests(self, prompts: Any, params: Any) -> list[Request]:
        several = [prompts] if _is_single(prompts) else list(prompts)
        each = (
            params if isinstance(params, Sequence) else [params or DecodingParams()] * len(several)
        )
        if len(each) != len(several):
            raise InputError(
                f"got {len(several)} prompts and {len(each)} params; give one for all or one for each"
            )
        for settings in each:
            if not isinstance(settings, DecodingParams):
                raise InputError(
                    f"`params` must be a `DecodingParams` or a list of them, got {settings!r:.80}"
                )
            if settings.stop and self.tokenizer is None:
                raise InputError(
                    "this checkpoint has no tokenizer to find stop texts with",
                    hint="leave out `stop`",
                )
        for settings in set(each):
            get_strategy(settings)  # an unknown strategy is an error before any compute
        return [
            self.request(index, prompt, settings)
            for index, (prompt, settings) in enumerate(zip(several, each, strict=True))
        ]

    def _by_block_length(self, requests: Sequence[Request]) -> dict[int, list[Request]]:
        groups: dict[int, list[Request]] = {}
        for request in requests:
            groups.setdefault(
                request.params.block_length or self.checkpoint.special_ids.block_length, []
            ).append(request)
        return groups

    def engine(self, block_length: int | None = None, **options: Any) -> Engine:
        """A new engine over this model, for servers and whoever else wants its steps; options as `Engine` takes them.

        Requests for it are made by `request`.
        """
        length = block_length or self.checkpoint.special_ids.block_length
        if self.prefix_cache_mib:
            options = {"prefix_cache": PrefixCache(length, self.prefix_cache_mib * 2**20)} | options
        return Engine(
            self.model,
            mask_token_id=self.checkpoint.special_ids.mask_token_id,
            eos_token_ids=self.checkpoint.special_ids.eos_token_ids,
            block_length=length,
            **{
                "max_batch_size": self.max_batch_size,
                "commit": self.commit,
                "compile_model": self.compile_model,
            }
            | options,
        )

    def _engine(self, block_length: int) -> Engine:
        """The engine of earlier calls, with its memory, graphs and known prefixes, unless it is in use."""
        if block_length not in self._engines or self._engines[block_length].is_busy():
            self._engines[block_length] = self.engine(block_length)
        return self._engines[block_length]

    def request(self, index: int, prompt: Prompt, params: DecodingParams) -> Request:
        """A request for an engine."""
        find_stop = partial(self._find_stop, params.stop) if params.stop else None
        return Request(index, self.encode(prompt), params, find_stop)

    def _find_stop(self, texts: Sequence[str], token_ids: Sequence[int]) -> int | None:
        """How many of the tokens to keep so that their text ends in the first of the stop `texts`; None without one."""
        if not any(text in self._text(token_ids) for text in texts):
            return None
        return next(
            n
            for n in range(1, len(token_ids) + 1)
            if any(t in self._text(token_ids[:n]) for t in texts)
        )

    def _text(self, token_ids: Sequence[int]) -> str:
        if self.tokenizer is None:
            return ""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _output(self, request: Request, completion: Completion) -> GenerationOutput:
        counters = completion.counters
        text = self._text(completion.token_ids)
        ends = [found for stop in request.params.stop if (found := text.find(stop)) >= 0]
        return GenerationOutput(
            text=text[: min(ends, default=len(text))],
            token_ids=completion.token_ids,
            prompt_token_ids=request.prompt_ids,
            finish_reason=completion.finish_reason,
            num_forwards=counters.num_forwards,
            num_prefill_forwards=counters.num_prefill_forwards,
            num_commit_forwards=counters.num_commit_forwards,
            num_positions=counters.num_positions,
        )

    def _stream_event(self, event: BlockEvent) -> StreamEvent:
        eos = self.checkpoint.special_ids.eos_token_ids
        end = next(
            (i for i, token in enumerate(event.token_ids) if token in eos), len(event.token_ids)
        )
        shown = [
            token
            for token, hidden in zip(event.token_ids[:end], event.masked, strict=False)
            if not hidden
        ]
        return StreamEvent(
            kind=event.kind,
            text=self._text(shown),
            token_ids=event.token_ids,
            masked=event.masked,
            confidence=event.confidence,
            position=event.position,
            step=event.step,
        )


def _is_single(prompts: Any) -> bool:
    """Whether this is one prompt rather than a list of them."""
    if isinstance(prompts, str):
        return True
    if not isinstance(prompts, Sequence):
        raise InputError(f"prompts must be a text or a list, got {type(prompts).__name__}")
    return bool(prompts) and isinstance(prompts[0], (int, Mapping))
