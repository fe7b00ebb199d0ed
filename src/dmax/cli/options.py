"""Options that several commands share, and the decoding parameters that they make."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from dmax.errors import InputError, shorten, show
from dmax.params import LARGEST_SEED, DecodingParams, EngineOptions

# The defaults of the options that these have.
DECODING = DecodingParams()
ENGINE = EngineOptions()
MOST_EXAMPLES = 100_000
LARGEST_BATCH = 65_536
LONGEST_PROMPT = 2**21  # characters; no model reads as many

ModelName = Annotated[str, typer.Option("--model", "-m", help="bundled name, folder or hub id")]
ModelNames = Annotated[
    list[str],
    typer.Option("--model", "-m", help="bundled name, folder or hub id; repeat for more"),
]
StrategyName = Annotated[
    str,
    typer.Option(help="auto (what the model was trained for), spd, threshold, … (docs/methods.md)"),
]
StrategyOptions = Annotated[
    list[str] | None,
    typer.Option("--option", help="NAME=VALUE, an option of the strategy; repeat for more"),
]
Threshold = Annotated[
    float | None, typer.Option(help="confidence to decode at (default: the strategy's own)")
]
MaxNewTokens = Annotated[int, typer.Option(help="longest completion, in tokens")]
TaskMaxNewTokens = Annotated[
    int | None,
    typer.Option(help="longest completion, in tokens (default: what the task needs)"),
]
TopK = Annotated[int, typer.Option(help="candidates blended into a soft input")]
BlockLength = Annotated[
    int | None, typer.Option(help="tokens decoded together (default: the checkpoint's own)")
]
Temperature = Annotated[float, typer.Option(help="0 decodes greedily")]
SamplingSeed = Annotated[int | None, typer.Option(help="of the sampling")]
StopTexts = Annotated[
    list[str] | None,
    typer.Option("--stop", help="text that ends a completion; repeat for more"),
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="go on to the longest completion")]
TaskName = Annotated[str, typer.Option(help="what to solve (docs/tasks.md)")]
DataFile = Annotated[
    Path | None, typer.Option("--data", help="JSONL of the task's rows, in place of the hub's")
]
Limit = Annotated[int, typer.Option(help="examples to solve", min=1, max=MOST_EXAMPLES)]
Seed = Annotated[int, typer.Option(help="of the examples", min=0, max=LARGEST_SEED)]
BatchSize = Annotated[
    int, typer.Option(help="sequences decoded together", min=1, max=LARGEST_BATCH)
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, …")]
CompileModel = Annotated[
    bool, typer.Option("--compile", help="compile the model; pays in long runs")
]
WarmUp = Annotated[
    bool,
    typer.Option("--warm-up/--no-warm-up", help="capture and compile before the first request"),
]
Quantization = Annotated[str | None, typer.Option(help="of the experts: int8, fp8 or int4")]
SummaryFile = Annotated[
    Path | None, typer.Option("--output", "-o", help="JSON file for the summary")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the results in --output")]
RAY = "Replicas under Ray (docs/scale.md)"
Ray = Annotated[
    bool, typer.Option("--ray", help="decode in replicas of the model", rich_help_panel=RAY)
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="HOST:PORT of a cluster, or auto; implies --ray", rich_help_panel=RAY),
]
NumReplicas = Annotated[
    int | None,
    typer.Option("--replicas", help="(default: one for each GPU, or one)", rich_help_panel=RAY),
]
GpusPerReplica = Annotated[
    int | None, typer.Option(help="(default: 1 where there are GPUs)", rich_help_panel=RAY)
]
EngineName = Annotated[
    str | None, typer.Option("--engine", help="dmax or vllm (default: dmax)", rich_help_panel=RAY)
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON on stdout")]


def decoding_params(*, option: list[str] | None = None, **given: Any) -> DecodingParams:
    """Decoding parameters from the options of a command.

    Args:
        option: texts NAME=VALUE, options of the strategy.
        given: fields of `DecodingParams`. None stands for the default.

    Raises:
        InputError: a value out of range, a text of another form, or a strategy that does not exist
            or does not take these settings.
    """
    from dmax.decoding import check_strategy

    fields = {name: value for name, value in given.items() if value is not None}
    params = DecodingParams(**fields, options=named_values(option or []))
    check_strategy(params)
    return params


def given_among(context: typer.Context, names: Collection[str]) -> str | None:
    """The first of some options that the command line gives, as it is written there."""
    for parameter in context.command.params:
        name = parameter.name or ""
        source: Any = context.get_parameter_source(name)
        if name in names and source.name == "COMMANDLINE":
            return parameter.opts[0]
    return None


def named_values(texts: list[str], flag: str = "--option") -> dict[str, Any]:
    """Texts `NAME=VALUE` after a flag as a dictionary; a value that is JSON is read as JSON."""
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise InputError(
                f"`{flag}` must be NAME=VALUE, got {show(text)}",
                hint=f"for example {flag} alpha=0.7",
            )
        try:
            options[name] = json.loads(value)
        except RecursionError:
            raise InputError(
                f"the value of `{flag} {shorten(name)}` is nested too deeply"
            ) from None
        except ValueError:
            options[name] = value
    return options


def read_prompts(given: list[str] | None, command: str = "generate") -> list[str]:
    """The prompts of a command's line, or the one on stdin.

    Raises:
        InputError: there is none, or one that is not text or too long.
    """
    try:
        texts = given or [_stdin().strip()]
        "".join(texts).encode()
    except UnicodeError:
        raise InputError(
            "the prompt is not UTF-8 text", hint="convert it, for example with iconv -t UTF-8"
        ) from None
    if not all(texts):
        raise InputError("no prompt given", hint=f'dmax {command} "your question"')
    return texts


def _stdin() -> str:
    """What stands on stdin, which may never end."""
    if sys.stdin is None:
        return ""
    if sys.stdin.isatty():
        sys.stderr.write("type the prompt, then Ctrl-D\n")
    text = sys.stdin.read(LONGEST_PROMPT + 1)
    if len(text) > LONGEST_PROMPT:
        raise InputError(f"the prompt on stdin is longer than {LONGEST_PROMPT:,} characters")
    return text
