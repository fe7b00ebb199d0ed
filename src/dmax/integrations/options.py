"""What operators and clients of another engine ask of dmax: flat options that begin with `dmax_`.

An engine passes extra options of a request on as they came: values from Python, often texts over
HTTP. They are read and checked here, where no engine is imported, before the request reaches a
process that an exception would end.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import Field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dmax.checkpoint_kind import named_decoding
from dmax.decoding import FALLBACK, get_strategy, strategy_class
from dmax.decoding.block import View
from dmax.decoding.strategy import Strategy
from dmax.errors import InputError, did_you_mean, shorten, show
from dmax.params import AUTO, DecodingParams
from dmax.special_ids import reads_shifted
from dmax.tiny import BUNDLED, bundled_head

# A child of vLLM's own, since servers show no others; elsewhere it is one like any other.
logger = logging.getLogger(f"vllm.{__name__}")

PREFIX = "dmax_"
SHARED = ("strategy", "threshold", "stop_confidence", "top_k", "max_steps_per_block")
"""The fields of `DecodingParams` among the options; every other one is the strategy's own."""
ELSEWHERE = {
    "block_length": "the block length is the checkpoint's",
    "deadline": "close the connection instead",
    "ignore_eos": "ask for `ignore_eos`",
    "max_new_tokens": "ask for `max_tokens`",
    "options": "name each option of the strategy with `dmax_` before it",
    "seed": "ask for `seed`",
    "stop": "ask for `stop`",
    "temperature": "ask for `temperature`",
}
"""The other fields of `DecodingParams`, and what to do instead."""
MOST_CANDIDATES = 32
"""The largest `top_k` of a client: an engine keeps and embeds as many candidates for every slot."""
FLAGS = {"true": True, "1": True, "false": False, "0": False}
NOTHING = ("none", "null")


def strategies_of(config: Any, name_or_path: str, folder: Path) -> tuple[str | None, str]:
    """The strategy that the config of a checkpoint names, and what "auto" stands for without one.

    What is known of a published model is a default, which an operator may override.

    Raises:
        InputError: the config names one that does not exist.
    """
    auto = named_decoding(config, name_or_path, folder) or FALLBACK
    return getattr(config, "decoding_strategy", None), auto


def server_params(
    extra: Mapping[str, Any] | None, named: str | None, auto: str = FALLBACK
) -> DecodingParams:
    """How a server decodes requests that ask for nothing else.

    The strategy is the one that the checkpoint names, else the server's `dmax_strategy`, else
    `auto`. Options for another strategy than the checkpoint's are left out, and a line in the log
    says so.

    Args:
        extra: the server's options; those without the prefix are others'.
        named: the strategy that the checkpoint names; None: it names none.
        auto: what "auto" stands for, if the checkpoint names none.

    Raises:
        InputError: as `request_params`.
    """
    wanted = given_options(extra).get("strategy", AUTO)
    chosen = named or auto
    if wanted not in (AUTO, named) and named is not None:
        _tell_left_out(named, show(wanted))
        return DecodingParams(strategy=named)
    return request_params(extra, DecodingParams(strategy=chosen), is_trusted=True)


@cache  # once for a process, which may ask for every request
def _tell_left_out(named: str, wanted: str) -> None:
    logger.warning(
        "the checkpoint names the strategy `%s`, so the server's `dmax_strategy` %s and its "
        "options are left out; to decode it otherwise, change `decoding_strategy` in its config",
        named,
        wanted,
    )


def request_params(
    extra: Mapping[str, Any] | None, server: DecodingParams, *, is_trusted: bool = False
) -> DecodingParams:
    """The options of a request over those of its server.

    Texts become numbers where an option is a number, and true or false where it is a flag. A
    request that names another strategy begins with that strategy's own threshold and options, since
    the server's were chosen for its own.

    Args:
        extra: flat options by name; those without the prefix are others'.
        server: what holds where the request says nothing.
        is_trusted: whether the options come from the operator, who may name files.

    Raises:
        InputError: an option that the strategy does not have, or a value out of range or of the
            wrong type. Whether the strategy takes them together is known when it is made.
    """
    given = given_options(extra)
    name = given.pop("strategy", AUTO)
    if name not in (AUTO, server.strategy):
        server = replace(server, strategy=name, threshold=None, options=())
    known = _known_options(server.strategy)
    for option in given:
        if option not in known:
            raise _unknown(option, server.strategy, [*known])
    values = {option: _read(value, known[option]) for option, value in given.items()}
    shared = {option: value for option, value in values.items() if option in SHARED}
    own = {option: value for option, value in values.items() if option not in SHARED}
    params = replace(server, **shared, options=dict(server.options) | own)
    if not is_trusted:
        check_client(values, params)
    return params


def check_runs_here(strategy: Strategy, engine: str) -> None:
    """Raise `InputError` for a strategy that needs more than one open block and its logits.

    Args:
        strategy: what a request asks for.
        engine: what the error calls the engine.
    """
    needs = None
    if strategy.blocks > 1:
        needs = f"{strategy.blocks} open blocks, and {engine} has one"
    elif strategy.num_branches > 1:
        needs = f"{strategy.num_branches} branches of a block, and {engine} computes one"
    elif strategy.needs_hidden_states:
        needs = f"hidden states, and {engine} gives logits only"
    if needs:
        raise InputError(
            f"strategy `{strategy.name}` needs {needs}",
            hint="decode it with `dmax.LLM`, or choose another `dmax_strategy`",
        )


def check_reading(config: Any, engine: str) -> None:
    """Raise `InputError` for a model whose predictions are read one position earlier (`shift`).

    Args:
        config: of the model.
        engine: as in `check_runs_here`.
    """
    if reads_shifted(config):
        raise InputError(
            "`shift` in config.json is true: a token is predicted by the position before it, and "
            f"{engine} reads predictions at their own positions",
            hint="decode it with `dmax.LLM` or `dmax serve`",
        )


def check_request(
    extra: Mapping[str, Any] | None, server: DecodingParams, engine: str
) -> DecodingParams:
    """The parameters of a request that an engine can serve.

    Args:
        extra: as in `request_params`.
        server: as in `request_params`; its `block_length` is that of the engine.
        engine: as in `check_runs_here`.

    Raises:
        InputError: as `request_params`, `dmax.decoding.get_strategy` and `check_runs_here`, or the
            strategy cannot decode blocks of this length.
    """
    params = request_params(extra, server)
    strategy = get_strategy(params)
    check_runs_here(strategy, engine)
    if params.block_length is not None:
        strategy.open(fresh_block(params.block_length))  # a head may be made for shorter ones
    return params


def fresh_block(length: int) -> View:
    """A block [1, L] of which nothing is decoded, on the CPU."""
    everywhere = torch.ones(1, length, dtype=torch.bool)
    return View(
        tokens=torch.zeros(1, length, dtype=torch.int64),
        masked=everywhere,
        active=everywhere,
        step=torch.zeros(1, dtype=torch.int64),
        max_steps=torch.full((1,), length),
        mask_token_id=0,
    )


def given_options(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of dmax among others, without their prefix."""
    mine = {name: value for name, value in (extra or {}).items() if name.startswith(PREFIX)}
    return {name.removeprefix(PREFIX): value for name, value in mine.items()}


def _known_options(strategy: object) -> dict[str, Field]:
    """Names and fields of all options that a strategy takes: the shared ones and its own."""
    shared = {entry.name: entry for entry in fields(DecodingParams)}
    # Subclasses are dataclasses, which mypy cannot know.
    all_fields: tuple[Field, ...] = fields(strategy_class(strategy))  # type: ignore[arg-type]
    own = {entry.name: entry for entry in all_fields if entry.init and entry.name not in shared}
    return {name: shared[name] for name in SHARED} | own


def check_client(
    values: Mapping[str, Any], params: DecodingParams, head_option: str = f"{PREFIX}head"
) -> None:
    """Raise `InputError` for what only the operator may ask for: files, and memory of everyone.

    Args:
        values: what the client asks for.
        params: what becomes of that.
        head_option: what the error calls the option that names a head.
    """
    head = values.get("head")
    heads = [name for name in BUNDLED if bundled_head(name, params.strategy).is_file()]
    if head is not None and head not in heads:
        raise InputError(
            f"`{head_option}` must be {' or '.join(heads or BUNDLED)} in a request, "
            f"got {show(head)}",
            hint="a file of the server is for its operator to name",
        )
    if "top_k" in values and params.top_k > MOST_CANDIDATES:
        raise InputError(
            f"`dmax_top_k` must be at most {MOST_CANDIDATES} in a request, got {params.top_k}"
        )


def _unknown(option: str, strategy: str, known: list[str]) -> InputError:
    name = shorten(f"{PREFIX}{option}")
    if option in ELSEWHERE:
        return InputError(f"there is no option `{name}`", hint=ELSEWHERE[option])
    names = [f"{PREFIX}{each}" for each in known]
    return InputError(
        f"strategy `{strategy}` has no option `{name}`",
        hint=did_you_mean(name, names) or f"it has {', '.join(names)}",
    )


def _read(value: Any, field: Field) -> Any:
    """A value as the field has it, where a text or a number can only mean that; else as it is."""
    if isinstance(field.default, bool):
        is_number = isinstance(value, (int, float)) and value in (0, 1)
        if is_number and not isinstance(value, bool):  # what JSON's true becomes on its way
            return bool(value)
        return FLAGS.get(value.lower(), value) if isinstance(value, str) else value
    if not field.metadata or not isinstance(value, str):
        return value
    if field.metadata.get("optional") and value.lower() in NOTHING:
        return None
    with suppress(ValueError):  # the check of the field says what was expected
        return int(value) if field.metadata.get("whole") else float(value)
    return value
