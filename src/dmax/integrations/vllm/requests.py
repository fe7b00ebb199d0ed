"""What requests may ask, checked in the process that answers.

An exception in the engine core ends it for everyone. So whatever a request holds is read here first
and refused with a sentence, which vLLM's server sends with status 400. What a worker reads again is
what has passed here.

SamplingParams of vLLM are more than block diffusion can do. `ACCEPTED` lists what holds; everything
else is refused, unless it is neutral (`top_p=1`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams

from dmax.errors import InputError, one_line, show
from dmax.integrations.options import check_request
from dmax.integrations.vllm.config import ENGINE, server_params
from dmax.integrations.vllm.wrapping import Method, is_served, wrap
from dmax.params import DecodingParams, check_number

# A child of vLLM's logger: others are not shown by its server.
logger = init_logger(f"vllm.{__name__}")

ACCEPTED = frozenset(
    # decoding
    "temperature seed max_tokens n extra_args "
    # endings
    "stop stop_token_ids ignore_eos include_stop_str_in_output "
    # what comes back
    "logprobs flat_logprobs detokenize skip_special_tokens spaces_between_special_tokens "
    "output_kind stream_interval output_text_buffer_length "
    # of vLLM itself, without an effect on tokens; it says what it thinks of watermarks
    "skip_clone skip_reading_prefix_cache watermarking".split()
)
MOST_LOGPROBS = 1024
"""Most tokens beside each whose log-probabilities a request may want; every slot has room for them,
whatever `--max-logprobs` allows."""
NEUTRAL = {"top_k": (0, -1)}
"""Values without an effect besides the default."""
INSTEAD = {
    "structured_outputs": "leave it out, as other structured outputs and forced tool calls",
    "top_k": "`dmax_top_k` in `vllm_xargs` is the number of candidates in soft inputs",
}
"""What to do instead of asking for it."""


# --- reading and checking ---


def check_params(params: SamplingParams, server: DecodingParams) -> DecodingParams:
    """How a request is decoded.

    Raises:
        InputError: it asks for something that block diffusion or its strategy cannot do.
    """
    neutral = SamplingParams()
    for name in SamplingParams.__struct_fields__:
        value = getattr(params, name)
        is_asked = not (name.startswith("_") or name in ACCEPTED)
        if is_asked and _has_effect(value, getattr(neutral, name), NEUTRAL.get(name, ())):
            what = "`response_format`" if name == "structured_outputs" else f"`{name}`"
            got = f", got {show(value)}" if isinstance(value, Real) else ""
            raise InputError(
                f"{what} does not go with decoding by blocks{got}",
                hint=INSTEAD.get(name, "leave it out"),
            )
    if params.logprobs is not None:
        check_number("logprobs", params.logprobs, low=0, high=MOST_LOGPROBS, whole=True)
    extra = params.extra_args or {}
    for name in extra:
        if name.startswith("diffusion_"):
            raise InputError(
                f"`{name}` is for other diffusion models",
                hint="options of this one begin with `dmax_`",
            )
    return _with_sampling(check_request(extra, server, ENGINE), params)


def decoding_params(
    params: SamplingParams, server: DecodingParams, seed: int | None = None
) -> DecodingParams:
    """How a worker decodes a request; never an exception, which would end the engine.

    What cannot be read has not passed `check_params`. It is left out, with a line in the log.

    Args:
        params: of the request.
        server: what holds where the request says nothing.
        seed: for a request that names none.
    """
    try:
        read = check_request(params.extra_args, server, ENGINE)
        return _with_sampling(read, params, seed)
    except InputError as error:
        logger.warning("options of a request are left out: %s", one_line(error))
        return server


def _with_sampling(
    read: DecodingParams, params: SamplingParams, seed: int | None = None
) -> DecodingParams:
    chosen = seed if params.seed is None else params.seed
    return replace(
        read,
        temperature=params.temperature,
        seed=None if chosen is None else chosen % 2**63,  # clients may send negative ones
        ignore_eos=True,  # vLLM ends requests itself, on the tokens of finished blocks
    )


def _has_effect(value: Any, neutral: Any, others: tuple[Any, ...]) -> bool:
    if neutral is None:
        return value is not None and value not in ([], {})
    return value != neutral and value not in others


def check_prompt(request: Any, mask_token_id: int) -> None:
    """Raise `InputError` for a prompt that is not plain token ids, or holds MASK.

    Args:
        request: what goes to the engine core; an `EngineCoreRequest`.
        mask_token_id: MASK, which is a status of positions and never a token.
    """
    if request.prompt_embeds is not None or request.prompt_token_ids is None:
        raise InputError(
            "the prompt must be token ids or a text, got embeddings",
            hint="blocks are decoded from tokens",
        )
    if mask_token_id in request.prompt_token_ids:
        raise InputError(
            f"the prompt holds the mask token {mask_token_id}",
            hint="leave it out: blocks are masked by the engine",
        )
    if request.lora_request is not None:
        raise InputError(
            "adapters cannot be chosen by request",
            hint="serve the checkpoint that they are merged into (`merge: true` in its recipe)",
        )


@contextmanager
def refused_by_vllm() -> Iterator[None]:
    """Raise as vLLM's own refusal, which its server answers with 400, what we refuse."""
    try:
        yield
    except InputError as error:
        raise VLLMValidationError(one_line(error)) from error


# --- where vLLM asks ---


def install() -> None:
    """Have vLLM check requests for our models; those for others stay as they are."""
    beams = "vllm.entrypoints.generate.beam_search"
    wrap("vllm.sampling_params:SamplingParams", "_validate_diffusion", _diffusion_rule)
    wrap("vllm.v1.engine.input_processor:InputProcessor", "process_inputs", _checked)
    wrap("vllm.v1.engine.async_llm:AsyncLLM", "generate", _checked_early)
    wrap("vllm.v1.engine.llm_engine:LLMEngine", "add_request", _greedy_unless_chosen)
    wrap(f"{beams}.online:BeamSearchOnlineMixin", "beam_search", _no_beams_online)
    wrap(f"{beams}.offline:BeamSearchOfflineMixin", "beam_search", _no_beams_offline)


def _diffusion_rule(original: Method) -> Method:
    """`SamplingParams._validate_diffusion`, which allows no temperature but 1 and no seed."""

    def validate(self: SamplingParams, model_config: Any) -> None:
        if not is_served(model_config):
            original(self, model_config)

    return validate


def _checked(original: Method) -> Method:
    """`InputProcessor.process_inputs`, which all requests pass on their way to the engine core."""

    def process(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kw: Any) -> Any:
        if not is_served(self.model_config) or not isinstance(params, SamplingParams):
            return original(self, request_id, prompt, params, *args, **kw)
        with refused_by_vllm():
            check_params(params, _server(self))
            request = original(self, request_id, prompt, params, *args, **kw)
            check_prompt(request, self.model_config.hf_config.mask_token_id)
        return request

    return process


def _checked_early(original: Method) -> Method:
    """`AsyncLLM.generate`, before the first chunk of a stream has sent status 200."""

    def generate(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        if is_served(self.model_config) and isinstance(sampling_params, SamplingParams):
            with refused_by_vllm():
                check_params(sampling_params, _server(self.input_processor))
        return original(self, prompt, sampling_params, *args, **kwargs)

    return generate


def _server(processor: Any) -> DecodingParams:
    """What holds for all requests of an `InputProcessor`; worked out once."""
    if not hasattr(processor, "dmax_server"):
        processor.dmax_server = server_params(processor.vllm_config)
    params: DecodingParams = processor.dmax_server
    return params


def _greedy_unless_chosen(original: Method) -> Method:
    """`LLMEngine.add_request`, the way of offline requests: a temperature that nobody chose is 0.

    `SamplingParams()` says 1, which vLLM's rule for diffusion models reads as "the model's own".
    The server has no such doubt: there the default is 0, and 1 is what a client has sent.
    """

    def add(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if is_served(self.model_config) and isinstance(params, SamplingParams):
            params = greedy_unless_chosen(params)
        return original(self, request_id, prompt, params, *args, **kwargs)

    return add


def greedy_unless_chosen(params: SamplingParams) -> SamplingParams:
    """The same parameters with temperature 0, if they are silent about sampling."""
    if params.temperature != 1 or params.seed is not None or params.n > 1:
        return params
    logger.info_once(
        "temperature 1 without a seed is what `SamplingParams()` says by itself, so requests are "
        "decoded greedily; give a seed to sample at 1"
    )
    params = params.clone()
    params.temperature = 0.0
    return params


def _no_beams_online(original: Method) -> Method:
    """`BeamSearchOnlineMixin.beam_search`, which asks for one token at a time."""

    def search(self: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_beams(self.engine_client.model_config)
        return original(self, *args, **kwargs)

    return search


def _no_beams_offline(original: Method) -> Method:
    """`BeamSearchOfflineMixin.beam_search`."""

    def search(self: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_beams(self.llm_engine.model_config)
        return original(self, *args, **kwargs)

    return search


def _refuse_beams(model_config: Any) -> None:
    if is_served(model_config):
        raise VLLMValidationError(
            "beam search does not go with decoding by blocks; leave out `use_beam_search`"
        )
