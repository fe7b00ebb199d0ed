"""The model `dmax` of lm-evaluation-harness: its tasks, prompts and scoring, our decoding and our counts.

lm_eval up to release 0.4.13 knows the models of its own source alone, so `dmax lm_eval …` is
`lm_eval …` with this one registered; later ones find it through the entry-point group
`lm_eval.models`.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, NoReturn, Self

import torch

from dmax.decoding import get_strategy
from dmax.environment import environment, weights_digest
from dmax.errors import InputError, did_you_mean
from dmax.llm import LLM
from dmax.outputs import Cost, GenerationOutput
from dmax.params import DecodingParams

try:
    import lm_eval.models  # noqa: F401  # the built-in models first: a registry that holds any is taken for complete
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import simple_parse_args_string
    from tqdm import tqdm
except ImportError as error:
    raise InputError(
        f"lm-evaluation-harness cannot be used: {error}", hint='pip install "dmax[eval]"'
    ) from None

logger = logging.getLogger(
    "lm_eval.models.dmax"
)  # lm_eval shows what is logged under its own name alone

# What a task says in its `generation_kwargs`, and `--gen_kwargs` in its place; the rest is said in
# `--model_args`.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
GREEDY_IGNORES = {
    "top_p": (1, None),
    "top_k": (0, -1, None),
    "min_p": (0, None),
}  # and the values that change nothing
NEVER = {"num_beams": (1, None), "repetition_penalty": (1, None)}
FROM_TASK = ("until", "do_sample", "temperature", *LENGTHS)
SETTINGS = tuple(f.name for f in fields(DecodingParams) if f.name not in ("options", "temperature"))
LOADING = (
    "pretrained",
    "dtype",
    "device",
    "mask_token_id",
    "eos_token_id",
    "batch_size",
    "max_batch_size",
)


def costs(outputs: Sequence[GenerationOutput]) -> dict[str, Any]:
    """What completions took, by the names `dmax eval` has for it; the parts that stop strings cut off are included."""
    tokens = sum(len(output.token_ids) for output in outputs)
    cost = sum((output.cost for output in outputs), Cost())
    ratios = [output.tokens_per_forward_paper for output in outputs]
    return {
        "requests": len(outputs),
        "generated_tokens": tokens,
        **asdict(cost),
        "tpf": tokens / cost.num_forwards if cost.num_forwards else 0.0,
        "tpf_paper": sum(ratios) / len(ratios) if ratios else 0.0,
    }


def model_settings(given: Mapping[str, Any]) -> DecodingParams:
    """Decoding parameters from model arguments; `option.NAME` is of the strategy alone.

    Raises:
        InputError: an argument that does not exist, or a value that does not fit.
    """
    options = {
        name.removeprefix("option."): value
        for name, value in given.items()
        if name.startswith("option.")
    }
    chosen = {name: value for name, value in given.items() if not name.startswith("option.")}
    if "temperature" in chosen:
        raise InputError(
            "`temperature` is a task's matter, not a model argument",
            hint="--gen_kwargs do_sample=true,temperature=0.8",
        )
    for name in chosen.keys() - set(SETTINGS):
        valid = (*LOADING, *SETTINGS, "option.NAME")
        raise InputError(
            f"unknown model argument `{name}`; choose from {', '.join(valid)}",
            hint=did_you_mean(name, valid),
        )
    params = DecodingParams(**chosen, options=options)
    get_strategy(params)  # an unknown strategy or option is an error before the model is loaded
    return params


def request_settings(
    given: Mapping[str, Any], base: DecodingParams
) -> tuple[DecodingParams, list[str]]:
    """Parameters and stop strings of one request: what its task says goes before what the model was given.

    Raises:
        InputError: the task asks for something that decoding does not have.
    """
    for name in given.keys() - {*FROM_TASK, *GREEDY_IGNORES, *NEVER}:
        raise InputError(
            f"unknown generation argument `{name}`; choose from {', '.join(FROM_TASK)}"
        )
    temperature = given.get("temperature")
    if given.get("do_sample") is False:
        temperature = 0.0
    elif temperature is None:
        temperature = 1.0 if given.get("do_sample") else 0.0
    checked = NEVER if temperature == 0 else NEVER | GREEDY_IGNORES
    for name, harmless in checked.items():
        if given.get(name) not in harmless:
            raise InputError(
                f"`{name}` {given[name]} of the task's generation_kwargs is not supported",
                hint=f"--gen_kwargs {name}={harmless[0]} does without",
            )
    until = given.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    length = next(
        (given[name] for name in LENGTHS if given.get(name) is not None), base.max_new_tokens
    )
    return replace(base, temperature=temperature, max_new_tokens=length), [
        stop for stop in stops if stop
    ]


def cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop string in it."""
    return text[
        : min((found for stop in stops if (found := text.find(stop)) >= 0), default=len(text))
    ]


@register_model("dmax")
class DMaxLM(LM):
    """A diffusion language model decoded by dmax; one process, on one device.

    Args:
        pretrained: bundled name, folder or hub id.
        dtype, device, mask_token_id, eos_token_id: as `LLM` takes them.
        batch_size: sequences decoded together; "auto" is `LLM`'s default, or `max_batch_size`.
        max_batch_size: for `batch_size="auto"`.
        trust_remote_code: has no effect, dmax runs none.
        settings: fields of `DecodingParams` but for the temperature, which is a task's matter;
            `option.NAME`.

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
        params = model_settings(settings)  # a wrong one is an error before the model is loaded
        if not pretrained:
            raise InputError("no model given", hint="--model_args pretrained=tiny-dmax")
        size = _batch_size(batch_size, max_batch_size)
        sizes = {} if size is None else {"max_batch_size": size}
        self.llm = LLM(pretrained, dtype, device, mask_token_id, eos_token_id, **sizes)  # type: ignore[arg-type]
        if self.llm.tokenizer is None:
            raise InputError(f"`{pretrained}` has no tokenizer, and lm_eval's tasks are texts")
        self.params = self.llm.resolve(params)
        self.tokenizer = self.llm.tokenizer
        self._device = self.llm.model.device
        self._outputs: dict[str, list[GenerationOutput]] = defaultdict(list)  # by task
        self._truncated = 0
        self._is_templated = False

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> Self:
        """The model of `--model_args`; these go before what lm_eval adds of its own."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Self:
        """As `create_from_arg_string`, from a dictionary."""
        added = {
            name: value for name, value in (additional_config or {}).items() if value is not None
        }
        if str(added.get("device")).startswith("cuda") and not torch.cuda.is_available():
            del added["device"]  # lm_eval's default, on any machine
        return cls(**added | arg_dict)

    # ---- what lm_eval asks of a model

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Completions of `(context, generation_kwargs)` requests, each cut at its first stop string."""
        if self.tokenizer.chat_template and not self._is_templated:
            logger.warning(
                "this model has a chat template and the prompts are raw; --apply_chat_template applies it"
            )
        settings = self._settings(requests)  # of all requests, before the first is decoded
        texts: list[str] = []
        size = 4 * self.llm.options.max_batch_size
        with tqdm(total=len(requests), disable=disable_tqdm, desc="dmax") as bar:
            for start in range(0, len(requests), size):
                chunk = requests[start : start + size]
                own = settings[start : start + size]
                params = [each for each, _ in own]
                prompts = [
                    self._encode(request.args[0], each)
                    for request, each in zip(chunk, params, strict=True)
                ]
                outputs = self.llm.generate(prompts, params)
                for request, output, (_, stops) in zip(chunk, outputs, own, strict=True):
                    texts.append(cut(output.text, stops))
                    self._outputs[str(request.task_name)].append(output)
                    self.cache_hook.add_partial("generate_until", request.args, texts[-1])
                bar.update(len(chunk))
        logger.info(
            "%(generated_tokens)d tokens in %(num_forwards)d forwards, TPF %(tpf).2f", self._total()
        )
        return texts

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refused: a masked diffusion model has bounds of a likelihood, not its value."""
        raise InputError(
            "a diffusion language model has no exact log-likelihood, so dmax runs generative tasks only",
            hint="choose tasks of output type generate_until, such as gsm8k",
        )

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> NoReturn:
        """Refused as `loglikelihood`."""
        self.loglikelihood(requests)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the text of a prompt; without a generation prompt the last message is to be continued."""
        self._is_templated = True
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's own text, for the record."""
        if isinstance(chat_template, str):
            raise InputError(f"chat templates by name, like {chat_template!r}, are not supported")
        if chat_template and not self.tokenizer.chat_template:
            raise InputError(
                f"{self.llm.checkpoint.path} has no chat template",
                hint="leave out --apply_chat_template",
            )
        self._is_templated = bool(
            chat_template
        )  # also where lm_eval has the prompts in its cache of requests
        return str(self.tokenizer.chat_template) if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """What lm_eval keys its cache of requests with."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The first id that ends a sequence."""
        return self.llm.checkpoint.special_ids.eos_token_ids[0]

    @property
    def max_length(self) -> int | None:
        """Positions the model has, if it says so."""
        return getattr(self.llm.model.config, "max_position_embeddings", None)

    def get_model_info(self) -> dict[str, Any]:
        """What becomes part of `results["config"]`; asked for after the last request."""
        return {
            "model_num_parameters": self.llm.model.num_parameters(),
            "model_dtype": str(self.llm.model.dtype).removeprefix("torch."),
            "dmax": {
                **self._total(),
                "truncated_prompts": self._truncated,
                "tasks": {name: costs(each) for name, each in self._outputs.items()},
                "weights": weights_digest(self.llm.model),
                "params": asdict(self.params),
                "decoding": repr(get_strategy(self.params)),
                "block_length": self.params.block_length
                or self.llm.checkpoint.special_ids.block_length,
                "batch_size": self.llm.options.max_batch_size,
                "environment": environment(self.llm.model.device),
            },
        }

    # ---- parts

    def _total(self) -> dict[str, Any]:
        return costs([output for each in self._outputs.values() for output in each])

    def _settings(self, requests: Sequence[Any]) -> list[tuple[DecodingParams, list[str]]]:
        """Of every request; lm_eval asks for several samples by repeating one, and each gets a seed of its own."""
        found = []
        copies = Counter[int]()
        for request in requests:
            params, stops = request_settings(request.args[1], self.params)
            if params.seed is not None:
                params = replace(params, seed=params.seed + copies[id(request)])
                copies[id(request)] += 1
            found.append((params, stops))
        return found

    def _encode(self, text: str, params: DecodingParams) -> list[int]:
        """Token ids of a prompt; what is too long loses its beginning, as with lm_eval's other models."""
        bos = self.tokenizer.bos_token
        has_bos = bool(bos) and text.startswith(str(bos))  # a template may have written it already
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=not has_bos)
        if self.max_length is None:
            return ids
        block = params.block_length or self.llm.checkpoint.special_ids.block_length
        room = (
            self.max_length // block * block - params.max_new_tokens
        )  # the last block is decoded whole
        if 0 < room < len(ids):
            self._truncated += 1
            logger.warning("a prompt of %d tokens was cut to its last %d", len(ids), room)
            return ids[-room:]
        return ids


def _batch_size(size: int | str, largest: int | None) -> int | None:
    """None for the default of `LLM`."""
    if str(size).partition(":")[0] == "auto":
        size = largest or "auto"
    if size == "auto":
        return None
    if not str(size).isdecimal() or int(size) < 1:
        raise InputError(f"`batch_size` must be a whole number of at least 1 or auto, got {size!r}")
    return int(size)


def main(arguments: Sequence[str]) -> None:
    """Run lm_eval's own command line, which reads `sys.argv`."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
