"""The model `dmax` of lm-evaluation-harness: its tasks and scoring, our decoding and our counts.

Up to release 0.4.13, lm_eval knows only the models in its own source. So `dmax lm_eval …` is
`lm_eval …` with this model registered. Later releases find it through the entry-point group
`lm_eval.models`.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from traceback import walk_tb
from typing import Any, NoReturn, Self

import torch

from dmax import extras
from dmax.chat_template import MAX_TOKEN, has_template, render_chat
from dmax.completers import CHUNK_BATCHES
from dmax.decoding import check_strategy, get_strategy
from dmax.environment import environment, weights_digest
from dmax.errors import InputError, did_you_mean
from dmax.evaluation.run import add_up
from dmax.llm import LLM
from dmax.messages import read_messages
from dmax.outputs import GenerationOutput, as_record, before_stop
from dmax.params import DecodingParams
from dmax.prompts import ANY_CONTEXT

try:
    # The built-in models come first: lm_eval loads none of them once its registry holds any.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import simple_parse_args_string
    from tqdm import tqdm
except ImportError as error:
    raise InputError(
        f"lm-evaluation-harness cannot be used: {error}", hint=extras.install_hint("eval")
    ) from None

logger = logging.getLogger("lm_eval.models.dmax")  # lm_eval shows only what its own loggers say

# Generation arguments, which a task or `--gen_kwargs` gives.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
FROM_TASK = ("until", "do_sample", "temperature", *LENGTHS)
# Generation arguments that decoding does not have, with the values that change nothing.
UNSUPPORTED = {"num_beams": (1, None), "repetition_penalty": (1, None)}
UNSUPPORTED_IN_SAMPLING = {"top_p": (1, None), "top_k": (0, -1, None), "min_p": (0, None)}
# Model arguments, which `--model_args` gives.
DECODING = tuple(
    field.name for field in fields(DecodingParams) if field.name not in ("options", "temperature")
)
LOADING = (
    "pretrained",
    "dtype",
    "device",
    "mask_token_id",
    "eos_token_id",
    "batch_size",
    "max_batch_size",
)


def count(outputs: Sequence[GenerationOutput]) -> dict[str, Any]:
    """What completions took, by the names of `dmax eval`.

    Whole completions count, also what stop strings cut off.
    """
    totals = add_up((len(output.token_ids), output.cost) for output in outputs)
    return {"requests": len(outputs), **as_record(totals)}


def model_settings(given: Mapping[str, Any]) -> DecodingParams:
    """Decoding parameters from model arguments; `option.NAME` is an option of the strategy.

    Raises:
        InputError: an argument that does not exist, or a value that does not fit.
    """
    params: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name.startswith("option."):
            options[name.removeprefix("option.")] = value
        elif name in DECODING:
            params[name] = value
        elif name == "temperature":
            raise InputError(
                "`temperature` is a task's matter, not a model argument",
                hint="--gen_kwargs do_sample=true,temperature=0.8",
            )
        else:
            valid = (*LOADING, *DECODING, "option.NAME")
            raise InputError(
                f"unknown model argument `{name}`; choose from {', '.join(valid)}",
                hint=did_you_mean(name, valid),
            )
    return DecodingParams(**params, options=options)


def request_settings(
    given: Mapping[str, Any], base: DecodingParams
) -> tuple[DecodingParams, list[str]]:
    """Decoding parameters and stop strings of one request.

    Args:
        given: what the task says. It wins over `base`.
        base: what the model was given.

    Raises:
        InputError: the task asks for something that decoding does not have.
    """
    for name in given.keys() - {*FROM_TASK, *UNSUPPORTED, *UNSUPPORTED_IN_SAMPLING}:
        raise InputError(
            f"unknown generation argument `{name}`; choose from {', '.join(FROM_TASK)}"
        )
    temperature = _temperature(given)
    checked = UNSUPPORTED if temperature == 0 else UNSUPPORTED | UNSUPPORTED_IN_SAMPLING
    for name, harmless in checked.items():
        if given.get(name) not in harmless:
            raise InputError(
                f"`{name}` {given[name]} of the task's generation_kwargs is not supported",
                hint=f"--gen_kwargs {name}={harmless[0]} does without",
            )
    until = given.get("until") or []
    stops = [until] if isinstance(until, str) else until
    lengths = [given[name] for name in LENGTHS if given.get(name) is not None]
    length = lengths[0] if lengths else base.max_new_tokens
    params = replace(base, temperature=temperature, max_new_tokens=length)
    return params, [stop for stop in stops if stop]


def _temperature(given: Mapping[str, Any]) -> float:
    if given.get("do_sample") is False:
        return 0.0
    if given.get("temperature") is not None:
        return given["temperature"]
    return 1.0 if given.get("do_sample") else 0.0


@register_model("dmax")
class DMaxLM(LM):
    """A diffusion language model decoded by dmax, in one process on one device.

    Args:
        pretrained: bundled name, folder or hub id.
        dtype, device, mask_token_id, eos_token_id: as `LLM` takes them.
        batch_size: sequences decoded together; "auto" is `max_batch_size`, or `LLM`'s default.
        max_batch_size: for `batch_size="auto"`.
        trust_remote_code: has no effect, since dmax runs no remote code.
        settings: `option.NAME`, and fields of `DecodingParams` except the temperature, which is a
            task's matter.

    Raises:
        InputError: an argument that does not exist, a value that does not fit, or a model without a
            tokenizer.
    """

    def __init__(
        self,
        pretrained: str = "",
        *,
        dtype: str = "auto",
        device: str = "auto",
        mask_token_id: int | None = None,
        eos_token_id: int | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        params = model_settings(settings)
        check_strategy(params)
        if not pretrained:
            raise InputError("no model given", hint="--model_args pretrained=tiny-dmax")
        size = _batch_size(batch_size, max_batch_size)
        sizes: dict[str, Any] = {} if size is None else {"max_batch_size": size}
        self.llm = LLM(pretrained, dtype, device, mask_token_id, eos_token_id, **sizes)
        if self.llm.tokenizer is None:
            raise InputError(f"`{pretrained}` has no tokenizer, and lm_eval's tasks are texts")
        self.params = self.llm.resolve(params)
        self.strategy = get_strategy(self.params)
        self.tokenizer = self.llm.tokenizer
        self._device = self.llm.model.device
        self._outputs: dict[str, list[GenerationOutput]] = defaultdict(list)  # by task
        self._truncated = 0
        self._is_templated = False

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> Self:
        """The model of `--model_args`, which win over what lm_eval adds."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Self:
        """As `create_from_arg_string`, from a dictionary."""
        added = additional_config or {}
        added = {name: value for name, value in added.items() if value is not None}
        # lm_eval's default is cuda:0 on any machine.
        if str(added.get("device")).startswith("cuda") and not torch.cuda.is_available():
            del added["device"]
        return cls(**added | arg_dict)

    # ---- what lm_eval asks of a model

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Completions of requests `(context, generation_kwargs)`, each cut at a stop string."""
        if has_template(self.tokenizer) and not self._is_templated:
            logger.warning(
                "this model has a chat template and the prompts are raw; "
                "--apply_chat_template applies it"
            )
        settings = self._settings_of(requests)  # of all requests, before the first is decoded
        texts: list[str] = []
        size = CHUNK_BATCHES * self.llm.options.max_batch_size
        with tqdm(total=len(requests), disable=disable_tqdm, desc="dmax") as bar:
            for start in range(0, len(requests), size):
                chunk = slice(start, start + size)
                texts += self._complete(
                    requests[chunk], settings[chunk], lambda done, total: bar.update()
                )
        logger.info(
            "%(generated_tokens)d tokens in %(num_forwards)d forwards, TPF %(tpf).2f", self._total()
        )
        return texts

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refused: a masked diffusion model has bounds of a likelihood, not its value."""
        raise InputError(
            "a diffusion language model has no exact log-likelihood, "
            "so dmax runs generative tasks only",
            hint="choose tasks of output type generate_until, such as gsm8k",
        )

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> NoReturn:
        """Refused as `loglikelihood`."""
        self.loglikelihood(requests)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the text of a prompt.

        Without a generation prompt, the last message is to be continued.
        """
        self._is_templated = True
        context = self.max_length or ANY_CONTEXT
        return render_chat(
            self.tokenizer,
            read_messages(chat_history),
            limit=2 * context * MAX_TOKEN,
            continues=not add_generation_prompt,
        )

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The text of the template, which lm_eval puts into its results."""
        if isinstance(chat_template, str):
            raise InputError(f"chat templates by name, like {chat_template!r}, are not supported")
        if chat_template and not has_template(self.tokenizer):
            raise InputError(
                f"{self.llm.checkpoint.path} has no chat template",
                hint="leave out --apply_chat_template",
            )
        # Said here too, since lm_eval may take the finished prompts from its cache of requests.
        self._is_templated = bool(chat_template)
        return str(self.tokenizer.chat_template) if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """The name under which lm_eval keeps its cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The first id that ends a sequence."""
        return self.llm.checkpoint.special_ids.eos_token_ids[0]

    @property
    def max_length(self) -> int | None:
        """How many positions the model has; None if it does not say."""
        return getattr(self.llm.model.config, "max_position_embeddings", None)

    def get_model_info(self) -> dict[str, Any]:
        """What becomes part of `results["config"]`; asked for after the last request."""
        own_length = self.llm.checkpoint.special_ids.block_length
        return {
            "model_num_parameters": self.llm.model.num_parameters(),
            "model_dtype": str(self.llm.model.dtype).removeprefix("torch."),
            "dmax": {
                **self._total(),
                "truncated_prompts": self._truncated,
                "tasks": {name: count(outputs) for name, outputs in self._outputs.items()},
                "weights": weights_digest(self.llm.model),
                "params": asdict(self.params),
                "decoding": repr(self.strategy),
                "block_length": self.params.block_length or own_length,
                "batch_size": self.llm.options.max_batch_size,
                "environment": environment(self.llm.model.device),
            },
        }

    # ---- parts

    def _total(self) -> dict[str, Any]:
        return count([output for outputs in self._outputs.values() for output in outputs])

    def _settings_of(self, requests: Sequence[Any]) -> list[tuple[DecodingParams, list[str]]]:
        """Decoding parameters and stop strings of every request.

        lm_eval asks for several samples by repeating a request. Each gets a seed of its own.
        """
        settings = []
        copies = Counter[int]()
        for request in requests:
            params, stops = request_settings(request.args[1], self.params)
            if params.seed is not None:
                params = replace(params, seed=params.seed + copies[id(request)])
                copies[id(request)] += 1
            settings.append((params, stops))
        return settings

    def _complete(
        self,
        requests: Sequence[Any],
        settings: Sequence[tuple[DecodingParams, list[str]]],
        progress: Callable[[int, int], None],
    ) -> list[str]:
        params = [own for own, _ in settings]
        pairs = zip(requests, params, strict=True)
        prompts = [self._encode(request.args[0], own) for request, own in pairs]
        outputs = self.llm.generate(prompts, params, progress)
        texts = []
        for request, output, (_, stops) in zip(requests, outputs, settings, strict=True):
            text = before_stop(output.text, stops)
            texts.append(text)
            self._outputs[str(request.task_name)].append(output)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _encode(self, text: str, params: DecodingParams) -> list[int]:
        """Token ids of a prompt.

        A prompt that is too long loses its beginning, as with the other models of lm_eval.
        """
        bos = self.tokenizer.bos_token
        has_bos = bool(bos) and text.startswith(str(bos))  # a template may have written it already
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=not has_bos)
        if self.max_length is None:
            return ids
        block = params.block_length or self.llm.checkpoint.special_ids.block_length
        whole_blocks = self.max_length // block * block  # the last block is decoded whole
        room = whole_blocks - params.max_new_tokens
        if 0 < room < len(ids):
            self._truncated += 1
            logger.warning("a prompt of %d tokens was cut to its last %d", len(ids), room)
            return ids[-room:]
        return ids


def _batch_size(size: int | str, largest: int | None) -> int | None:
    """The batch size that lm_eval's arguments ask for; None for the default of `LLM`."""
    if str(size).partition(":")[0] == "auto":
        size = largest or "auto"
    if size == "auto":
        return None
    if not str(size).isdecimal() or int(size) < 1:
        raise InputError(f"`batch_size` must be a whole number of at least 1 or auto, got {size!r}")
    return int(size)


def main(arguments: Sequence[str]) -> None:
    """Run lm_eval's own command line, which reads `sys.argv`.

    Raises:
        InputError: lm_eval itself fails: an unknown task or model, a task that cannot be read.
    """
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    # Its errors have no type of their own; those that come out of our model are ours.
    except Exception as error:
        if isinstance(error, InputError) or _is_ours(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"lm_eval stopped with {type(error).__name__}: {reason}",
            hint="dmax lm_eval --help lists what it takes, lm-eval ls tasks its tasks",
        ) from error


def _is_ours(error: Exception) -> bool:
    """Whether lm_eval was in our model when it failed."""
    frames = [frame.f_globals.get("__name__") for frame, _ in walk_tb(error.__traceback__)]
    return __name__ in frames[1:]  # the first is `main`
