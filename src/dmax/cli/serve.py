"""`dmax serve`: its options, and the server that is made of them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmax import extras
from dmax.cli import options
from dmax.cli.terminal import say
from dmax.errors import InputError, did_you_mean, show
from dmax.serve.settings import ServerOptions

if TYPE_CHECKING:
    from dmax.serve.served import ServedModel

logger = logging.getLogger(__name__)

DEFAULTS = ServerOptions()
MODELS = ("tiny-dmax", "tiny-base")  # side by side in the playground
ENGINES = ("dmax", "vllm", "sglang")
OF_ALL_ENGINES = frozenset(
    "model engine host port dtype max_batch_size max_length api_key_file arguments".split()
)
"""The options that other engines have, too."""
ACCESS = "Who may call"
LIMITS = "Limits"
TIMES = "Seconds"
LOG = "Log"


def _option(help: str, panel: str, *names: str, **bounds: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **bounds)


Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        help="bundled name, folder or hub id; repeat for more (default: tiny-dmax and tiny-base)",
    ),
]
Host = Annotated[str, typer.Option(help="to listen on; 0.0.0.0: all networks")]
Port = Annotated[int, typer.Option(help="to listen on; 0: any that is free", min=0, max=65535)]
MaxLength = Annotated[
    int | None, typer.Option(help="positions of a sequence (default: as many as it needs)")
]
EngineName = Annotated[str, typer.Option(help="dmax, or vllm or sglang for many GPUs")]
Arguments = Annotated[
    list[str] | None,
    typer.Argument(help="options of the other engine, after --", metavar="-- …"),
]
KeyFile = Annotated[
    Path | None, _option("keys, one a line; also in DMAX_API_KEY", ACCESS, "--api-key-file")
]
AllowedHosts = Annotated[
    list[str] | None, _option("a name that requests may address; repeat", ACCESS, "--allowed-host")
]
CorsOrigins = Annotated[
    list[str] | None,
    _option("web pages that may call, as https://a.example; repeat", ACCESS, "--cors-origin"),
]
BatchSize = Annotated[int, _option("sequences that a model decodes at once", LIMITS)]
MaxQueue = Annotated[int, _option("requests of a model that wait for a slot", LIMITS)]
MaxPromptTokens = Annotated[int | None, _option("of a request (default: the context)", LIMITS)]
MaxNewTokens = Annotated[int | None, _option("of a request (default: the context)", LIMITS)]
MaxTotalTokens = Annotated[
    int | None, _option("of all requests of a model (default: no limit)", LIMITS)
]
MaxChoices = Annotated[int, _option("answers, or prompts, of a request", LIMITS)]
MaxBodyBytes = Annotated[int, _option("of a request", LIMITS)]
MaxJsonDepth = Annotated[int, _option("of a request", LIMITS)]
MaxConnections = Annotated[int, _option("open at once", LIMITS)]
MaxBufferedBytes = Annotated[int, _option("of a stream that nobody reads", LIMITS)]
MaxSeconds = Annotated[float, _option("until a request ends with what it has", TIMES)]
HeaderSeconds = Annotated[float, _option("for a client to send its headers", TIMES)]
BodySeconds = Annotated[float, _option("for a client to send its body", TIMES)]
ShutdownSeconds = Annotated[
    float,
    _option("for running requests to finish after Ctrl-C or SIGTERM", TIMES, "--shutdown-timeout"),
]
LogJson = Annotated[bool, _option("one JSON object a request", LOG, "--log-json")]
LogFile = Annotated[Path | None, _option("add the log to it (default: stderr)", LOG)]


def serve(
    context: typer.Context,
    arguments: Arguments = None,
    model: Models = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    dtype: options.Dtype = "auto",
    quantization: options.Quantization = None,
    device: options.Device = "auto",
    compile_model: options.CompileModel = False,
    max_length: MaxLength = None,
    warm_up: options.WarmUp = True,
    engine: EngineName = "dmax",
    api_key_file: KeyFile = None,
    allowed_host: AllowedHosts = None,
    cors_origin: CorsOrigins = None,
    max_batch_size: BatchSize = DEFAULTS.max_batch_size,
    max_queue: MaxQueue = DEFAULTS.max_queue,
    max_prompt_tokens: MaxPromptTokens = DEFAULTS.max_prompt_tokens,
    max_new_tokens: MaxNewTokens = DEFAULTS.max_new_tokens,
    max_total_tokens: MaxTotalTokens = DEFAULTS.max_total_tokens,
    max_choices: MaxChoices = DEFAULTS.max_choices,
    max_body_bytes: MaxBodyBytes = DEFAULTS.max_body_bytes,
    max_json_depth: MaxJsonDepth = DEFAULTS.max_json_depth,
    max_connections: MaxConnections = DEFAULTS.max_connections,
    max_buffered_bytes: MaxBufferedBytes = DEFAULTS.max_buffered_bytes,
    max_seconds: MaxSeconds = DEFAULTS.max_seconds,
    header_seconds: HeaderSeconds = DEFAULTS.header_seconds,
    body_seconds: BodySeconds = DEFAULTS.body_seconds,
    shutdown_seconds: ShutdownSeconds = DEFAULTS.shutdown_seconds,
    log_json: LogJson = False,
    log_file: LogFile = None,
) -> None:
    """Serve models over HTTP, with OpenAI's interface and a playground (docs/serving.md).

    Ctrl-C lets running requests finish; a second one ends at once.

    Example: dmax serve --model tiny-dmax --port 8000
    """
    if engine not in ENGINES:
        hint = did_you_mean(engine, ENGINES) or f"choose from {', '.join(ENGINES)}"
        raise InputError(f"there is no engine {show(engine)}", hint)
    if engine != "dmax":
        _start_other(context)
    if arguments:
        raise InputError(
            f"`dmax serve` takes options only, got {show(arguments[0])}",
            hint=f"--model {arguments[0]}",
        )
    # Paths by themselves: in older releases of typer the context holds them as texts.
    _serve(context.params | {"api_key_file": api_key_file, "log_file": log_file})


def _serve(given: Mapping[str, Any]) -> None:
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        extras.require(package, "serve", "dmax serve")
    names = tuple(given["model"] or MODELS)
    say("loading the server …")
    from dmax.serve.checks import is_loopback
    from dmax.serve.keys import read_keys
    from dmax.serve.metrics import Metrics, router
    from dmax.serve.run import bind, leave, run, url_of

    logging.getLogger("dmax.engine").setLevel(logging.INFO)  # how a warm-up goes on
    settings = _settings(given, read_keys(given["api_key_file"]))
    with bind(given["host"], given["port"]) as listener:
        if not (settings.api_keys or is_loopback(given["host"])):
            logger.warning("everyone who reaches this machine may call: set --api-key-file")

        from dmax.serve.app import create_app

        models = [_model(name, given, settings) for name in names]
        metrics = Metrics({model.name: model.busy for model in models})
        app = create_app(models, settings)
        app.include_router(router(metrics))
        say(f"loading {', '.join(names)}; {url_of(listener)}/health says when it is ready")
        logged = {name: given[name] for name in ("log_file", "log_json")}
        run(app, models, settings, listener, metrics, **logged, tell=_tell)
    leave()


def _settings(given: Mapping[str, Any], keys: tuple[str, ...]) -> ServerOptions:
    same = {entry.name for entry in fields(ServerOptions)} & given.keys()
    return ServerOptions(
        **{name: given[name] for name in same},
        api_keys=keys,
        cors_origins=tuple(given["cors_origin"] or ()),
        allowed_hosts=tuple(given["allowed_host"] or ()),
    )


def _model(name: str, given: Mapping[str, Any], settings: ServerOptions) -> ServedModel:
    from dmax.llm import LLM
    from dmax.serve.served import ServedModel

    chosen = "dtype device quantization compile_model max_length max_batch_size warm_up".split()
    return ServedModel(name, partial(LLM, name, **{key: given[key] for key in chosen}), settings)


def _tell(text: str) -> None:
    with suppress(OSError):  # nobody reads it, and the server goes on
        sys.stdout.write(text)
        sys.stdout.flush()


def _start_other(context: typer.Context) -> None:
    """Become the server of another engine.

    Raises:
        InputError: it is not installed, or has no such option.
    """
    from dmax.serve.engines import NAMES, command_for
    from dmax.serve.keys import read_keys

    given = context.params
    engine: str = given["engine"]
    strange = options.given_among(context, given.keys() - OF_ALL_ENGINES)
    if strange:
        raise InputError(
            f"{NAMES[engine]} has no `{strange}`",
            hint="its own options go after --, as in: dmax serve --engine "
            f"{engine} --model NAME -- --tensor-parallel-size 2",
        )
    models = given["model"] or [MODELS[0]]
    if len(models) > 1:
        raise InputError(f"{NAMES[engine]} serves one model, and there are {len(models)}")
    is_asked = options.given_among(context, ("max_batch_size",)) is not None
    is_sized = is_asked or engine == "sglang"  # which has 1 as its own default
    command_for(
        engine,
        models[0],
        **{name: given[name] for name in ("host", "port", "dtype", "max_length")},
        max_batch_size=given["max_batch_size"] if is_sized else None,
        keys=read_keys(given["api_key_file"]),
        others=given["arguments"] or (),
    ).start()
