"""`dmax chat`: its options, and who answers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmax.cli import options
from dmax.cli.terminal import doing
from dmax.errors import InputError
from dmax.params import check_number

if TYPE_CHECKING:
    from dmax.chat.responder import Responder

SERVER = "A server in place of a model here"
OF_THE_MODEL = ("dtype", "quantization", "device")
OF_THE_SERVER = ("api_key_env",)
LONGEST_PACE = 10.0
USUAL_MODEL = "tiny-dmax"

ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help=f"bundled name, folder or hub id (default: {USUAL_MODEL}); with --url, its name there",
    ),
]
System = Annotated[str | None, typer.Option(help="what the model is told before the conversation")]
Pace = Annotated[float, typer.Option(help="seconds that each draft stays at least")]
Url = Annotated[str | None, typer.Option(help="http://…/v1", rich_help_panel=SERVER)]
KeyVariable = Annotated[
    str | None,
    typer.Option(
        "--api-key-env",
        help="environment variable that holds the server's key (default: OPENAI_API_KEY)",
        rich_help_panel=SERVER,
    ),
]


def chat(
    context: typer.Context,
    model: ModelName = None,
    strategy: options.StrategyName = options.DECODING.strategy,
    threshold: options.Threshold = None,
    max_new_tokens: options.MaxNewTokens = options.DECODING.max_new_tokens,
    option: options.StrategyOptions = None,
    temperature: options.Temperature = options.DECODING.temperature,
    seed: options.SamplingSeed = None,
    system: System = None,
    pace: Pace = 0.0,
    dtype: options.Dtype = "auto",
    quantization: options.Quantization = None,
    device: options.Device = "auto",
    url: Url = None,
    api_key_env: KeyVariable = None,
) -> None:
    """Talk to a model in the terminal, and watch its drafts sharpen.

    Type /help for the commands; Ctrl-C ends an answer, Ctrl-D the chat.
    Each line of a pipe is a question.

    Example: dmax chat
    """
    _check_who_answers(context, url)
    check_number("pace", pace, low=0, high=LONGEST_PACE)
    params = options.decoding_params(
        strategy=strategy,
        threshold=threshold,
        max_new_tokens=max_new_tokens,
        option=option,
        temperature=temperature,
        seed=seed,
    )
    with doing(f"loading {_name(model)}" if url is None else "asking the server"):
        from dmax.chat.loop import Chat

        responder = _model(context.params) if url is None else _server(context.params)
    Chat(responder, params, system or None, pace).run()


def _check_who_answers(context: typer.Context, url: str | None) -> None:
    """Make sure that no option speaks of the one who does not answer.

    Raises:
        InputError: one does.
    """
    strange = options.given_among(context, OF_THE_SERVER if url is None else OF_THE_MODEL)
    if strange and url is None:
        raise InputError(f"`{strange}` goes with --url only")
    if strange:
        raise InputError(f"`{strange}` does not go with --url: the server decides over it")


def _model(given: Mapping[str, Any]) -> Responder:
    """A model in this process."""
    from dmax.chat.local import LocalResponder
    from dmax.llm import LLM

    names = ("dtype", "quantization", "device")
    load = partial(LLM, **{name: given[name] for name in names}, max_batch_size=1)
    return LocalResponder(_name(given["model"]), load)


def _name(model: str | None) -> str:
    return USUAL_MODEL if model is None else model


def _server(given: Mapping[str, Any]) -> Responder:
    """A server."""
    from dmax.chat.server import ServerResponder

    return ServerResponder(given["url"], given["model"], given["api_key_env"])
