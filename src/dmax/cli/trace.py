"""`dmax trace`: its options, and what is made of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from dmax.cli import options
from dmax.cli.terminal import console, doing, print_json
from dmax.errors import InputError, shorten
from dmax.params import DecodingParams

if TYPE_CHECKING:
    from dmax.trace import Trace

USUAL_OUTPUT = Path("trace.html")
MOST_RUNS = 8
# How pages and traces of ours begin, within the first bytes.
OURS = re.compile(rb'<meta name="generator" content="dmax">|"format":\s*"dmax-trace"')
LOOKED_AT = 4096
FIELDS = tuple(entry.name for entry in fields(DecodingParams) if entry.name != "options")

Prompt = Annotated[
    str | None, typer.Argument(help="the prompt; read from stdin if it is not given")
]
Compare = Annotated[
    list[str] | None,
    typer.Option(
        help="KEY=VALUE,… adds a run that differs from the first in its model or in settings; "
        "repeat for more"
    ),
]
Open = Annotated[
    list[Path] | None,
    typer.Option("--open", help="show traces that were saved as JSON; repeat for more"),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help=f"the page, or the raw trace if it ends in .json (default: {USUAL_OUTPUT})",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="print the raw trace on stdout (docs/trace.md)")
]


@dataclass(frozen=True, slots=True)
class Run:
    """What one pane shows."""

    model: str
    params: DecodingParams


def trace(
    context: typer.Context,
    prompt: Prompt = None,
    model: options.ModelName = "tiny-dmax",
    compare: Compare = None,
    opened: Open = None,
    output: Output = None,
    strategy: options.StrategyName = options.DECODING.strategy,
    threshold: options.Threshold = None,
    max_new_tokens: options.MaxNewTokens = options.DECODING.max_new_tokens,
    top_k: options.TopK = options.DECODING.top_k,
    option: options.StrategyOptions = None,
    block_length: options.BlockLength = None,
    temperature: options.Temperature = options.DECODING.temperature,
    seed: options.SamplingSeed = None,
    stop: options.StopTexts = None,
    ignore_eos: options.IgnoreEos = False,
    dtype: options.Dtype = "auto",
    quantization: options.Quantization = None,
    device: options.Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Show every step of a completion as a page that plays it.

    Example: dmax trace "Jack starts the week with 8 mugs.
    Later Jack hands 2 mugs to a teacher. Jack throws away 4 broken mugs.
    A friend gives Jack 5 more mugs. Jack wins 6 mugs in a game.
    Jack receives 4 mugs as a present. How many mugs does Jack end up with?" -o trace.html

    Beside another model: --compare model=tiny-base,threshold=0.3
    """
    place = output if output or as_json else USUAL_OUTPUT
    if place:
        check_place(place)
    if opened:
        _check_alone(prompt, compare)
        traces = _read(opened)
    else:
        traces = _record(prompt, _runs(context.params), context.params)
    if place:
        write(place, traces)
    if as_json:
        print_json(_plain(traces))
        return
    for each in traces:
        console.print(_in_words(each), style="dim", soft_wrap=True)
    sys.stdout.write(f"{place}\n")


def check_place(path: Path) -> None:
    """Make sure that nothing but an earlier trace is replaced, before anything is decoded.

    Raises:
        InputError: something else is there, or nothing can be written.
    """
    from dmax.files import check_writable

    check_writable(path)
    if not path.exists():
        return
    with path.open("rb") as file:
        head = file.read(LOOKED_AT)
    if head and not OURS.search(head):
        raise InputError(
            f"{shorten(str(path))} exists and is no trace, so it is not replaced",
            hint="name another file, or remove it",
        )


def _check_alone(prompt: str | None, compare: list[str] | None) -> None:
    if prompt is not None or compare:
        raise InputError(
            "--open shows what was recorded, so it takes neither a prompt nor --compare",
            hint="repeat --open to see several traces side by side",
        )


def _read(paths: Sequence[Path]) -> list[Trace]:
    from dmax.trace.file import load_traces

    traces = [each for path in paths for each in load_traces(path)]
    _check_number(len(traces))
    return traces


def _runs(given: Mapping[str, Any]) -> list[Run]:
    """The run that the options ask for, and those that `--compare` adds."""
    _check_number(1 + len(given["compare"] or ()))
    changes = [
        options.named_values(text.split(","), "--compare") for text in given["compare"] or ()
    ]
    return [_run(given, each) for each in ({}, *changes)]


def _check_number(number: int) -> None:
    if number > MOST_RUNS:
        raise InputError(f"a page shows at most {MOST_RUNS} traces side by side, got {number}")


def _run(given: Mapping[str, Any], changes: Mapping[str, Any]) -> Run:
    """A run with the settings of the command, but for those that change.

    Another strategy begins with its own threshold and options.
    """
    from dmax.decoding import check_strategy

    settings = {name: given[name] for name in FIELDS if given.get(name) is not None}
    own = options.named_values(given["option"] or [])
    if changes.get("strategy", given["strategy"]) != given["strategy"]:
        settings.pop("threshold", None)
        own = {}
    settings |= {name: value for name, value in changes.items() if name in FIELDS}
    own |= {name: value for name, value in changes.items() if name not in (*FIELDS, "model")}
    params = DecodingParams(**settings, options=own)
    check_strategy(params)
    return Run(str(changes.get("model", given["model"])), params)


def _record(prompt: str | None, runs: Sequence[Run], given: Mapping[str, Any]) -> list[Trace]:
    """Decode the prompt once for every run; a model is loaded once."""
    [text] = options.read_prompts(None if prompt is None else [prompt], "trace")
    models = dict.fromkeys(run.model for run in runs)
    with doing(f"loading {', '.join(models)}"):
        from dmax.llm import LLM
        from dmax.trace import record

        quantization = cast(Any, given["quantization"])
        llms = {
            name: LLM(name, given["dtype"], given["device"], quantization=quantization)
            for name in models
        }
    with doing("decoding"):
        return [record(llms[run.model], text, run.params, name=run.model) for run in runs]


def write(path: Path, traces: Sequence[Trace]) -> None:
    """Write traces as their page, or as JSON into a file whose name ends in .json.

    Raises:
        InputError: the file cannot be written.
    """
    from dmax.files import write_atomically
    from dmax.trace.file import to_json
    from dmax.trace.page import page

    if path.suffix.lower() == ".json":
        write_atomically(path, to_json(_plain(traces)) + "\n")
    else:
        write_atomically(path, page([each.record for each in traces]))


def _plain(traces: Sequence[Trace]) -> Any:
    """One trace as it is, several as a list; `--open` reads either."""
    records = [each.record for each in traces]
    return records if len(records) > 1 else records[0]


def _in_words(trace: Trace) -> str:
    output = trace.output
    return (
        f"{trace.record['model']}, {trace.record['params']['strategy']}: "
        f"{len(output['token_ids'])} tokens in {output['num_forwards']} forwards "
        f"({output['tokens_per_forward']:.2f} per forward), {output['finish_reason']}"
    )
