"""The `dmax` command: what each of its commands takes, and where its work is done.

Each command imports what it needs when it runs, so that `--help` waits for nothing.
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from dmax import extras
from dmax.cli import options
from dmax.cli.boundary import DEBUG, Commands, keeping, run
from dmax.cli.chat import chat
from dmax.cli.convert import convert
from dmax.cli.distill import distill
from dmax.cli.evaluate import evaluate
from dmax.cli.reproduce import reproduce
from dmax.cli.serve import serve
from dmax.cli.terminal import (
    ConsoleHandler,
    console,
    doing,
    print_json,
    print_version,
    progress_bar,
    quiet_datasets,
    quiet_transformers,
)
from dmax.cli.trace import trace
from dmax.cli.train import train
from dmax.outputs import as_record

if TYPE_CHECKING:
    from dmax.evaluation.statistics import SweepRecord

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Entry point: bad input ends with one sentence on stderr and exit code 2."""
    handler = ConsoleHandler()
    log = logging.getLogger("dmax")
    log.addHandler(handler)
    quiet_transformers()
    quiet_datasets()
    try:
        sys.exit(run(app, sys.argv[1:]))
    finally:
        log.removeHandler(handler)


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", help="print the version", is_eager=True, callback=print_version),
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="show where an error comes from")] = False,
) -> None:
    """Train, decode and measure self-revising diffusion language models."""


@app.command()
def demo(as_json: options.AsJson = False) -> None:
    """Solve unseen word problems with the bundled models, base and DMax side by side.

    Example: dmax demo
    """
    from dmax.demo import run_demo

    run_demo(as_json=as_json)


@app.command()
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="prompts; read from stdin if none is given")
    ] = None,
    model: options.ModelName = "tiny-dmax",
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
    as_json: options.AsJson = False,
) -> None:
    """Complete one or more prompts.

    Example: dmax generate "Jack starts the week with 8 mugs.
    Later Jack hands 2 mugs to a teacher. Jack throws away 4 broken mugs.
    A friend gives Jack 5 more mugs. Jack wins 6 mugs in a game.
    Jack receives 4 mugs as a present. How many mugs does Jack end up with?"
    """
    texts = options.read_prompts(prompts)
    with doing(f"loading {model}"):
        from dmax.llm import LLM

        params = options.decoding_params(
            strategy=strategy,
            threshold=threshold,
            max_new_tokens=max_new_tokens,
            top_k=top_k,
            option=option,
            block_length=block_length,
            temperature=temperature,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
        )
        llm = LLM(model, dtype=dtype, device=device, quantization=cast(Any, quantization))
    with progress_bar("decoding", len(texts)) as progress:
        outputs = llm.generate(list(texts), params, progress)
    if as_json:
        records = [as_record(output) for output in outputs]
        for record, output in zip(records, outputs, strict=True):
            record["tokens_per_forward"] = output.tokens_per_forward
        print_json(records)
        return
    for output in outputs:
        sys.stdout.write(output.text + "\n")
        console.print(
            f"{len(output.token_ids)} tokens in {output.num_forwards} forwards "
            f"({output.tokens_per_forward:.2f} per forward), {output.finish_reason}",
            style="dim",
        )


app.command()(chat)


app.command()(trace)


app.command()(convert)


app.command()(train)


app.command()(distill)


app.command()(reproduce)


app.command()(serve)


app.command("eval")(evaluate)


@app.command()
def bench(
    device: options.Device = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="fewer problems, sizes and repeats")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file for the results")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure the speed of the bundled models on a CPU.

    On a CUDA GPU it measures a model of LLaDA-2.0-mini's shape, with random weights.

    Example: dmax bench --quick
    """
    with doing("loading the benchmark"):
        from dmax.benchmark.report import console as open_console
        from dmax.benchmark.run import run_benchmark

    console_of_tables = open_console(stderr=as_json)
    with keeping(f"finished tables are in {output}" if output else "nothing is kept"):
        record = run_benchmark(device, quick=quick, console=console_of_tables, output=output)
    if as_json:
        print_json(record)


@app.command("lm_eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with `dmax` among its models.

    All arguments are those of its command lm_eval.

    Example: dmax lm_eval --model dmax --model_args pretrained=tiny-dmax,threshold=0.5 --tasks gsm8k
    """
    extras.require("lm_eval", "eval", "dmax lm_eval")
    with doing("loading lm-evaluation-harness"):
        from dmax.evaluation.harness import main as run_lm_eval

    run_lm_eval(context.args)


@app.command()
def sweep(
    model: options.ModelNames,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="folder for sweep.json, plots and report.html")
    ],
    strategies: Annotated[
        str, typer.Option(help="decoding strategies, separated by commas")
    ] = "spd,threshold",
    thresholds: Annotated[
        str, typer.Option(help="start:stop:step, or a list separated by commas")
    ] = "0:1:0.1",
    task: options.TaskName = "word_problems",
    data: options.DataFile = None,
    limit: options.Limit = 200,
    seed: options.Seed = 7,
    max_new_tokens: options.TaskMaxNewTokens = None,
    batch_size: options.BatchSize = 32,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Trace accuracy against tokens per forward: models x methods x thresholds.

    The result is a table, a plot and a page. A method without a threshold is swept over its own
    setting. An interrupted sweep goes on where it stopped.

    Example: dmax sweep --model tiny-base --model tiny-dmax --output runs/sweep
    """
    names = [name.strip() for name in strategies.split(",")]
    extras.require("matplotlib", "eval", "drawing a plot")
    with doing(f"loading {', '.join(model)}"):
        from dmax.evaluation.sweep import RECORD, check_folder, curves_of, parse_grid, run_sweep
        from dmax.hub import find_folder
        from dmax.llm import LLM
        from dmax.tasks import get_task

        curves = curves_of(model, names, parse_grid(thresholds), max_new_tokens)
        check_folder(output)
        chosen = get_task(task, data)
        for checkpoint in model:
            find_folder(checkpoint)  # an unknown one is an error before the first is measured
    kept = f"finished points are kept in {output / RECORD}, and the same command goes on"
    with keeping(kept), progress_bar(f"sweeping {chosen.name}") as progress:
        record = run_sweep(
            curves,
            chosen,
            output / RECORD,
            limit=limit,
            seed=seed,
            max_new_tokens=max_new_tokens,
            data=None if data is None else str(data),
            open_model=partial(LLM, dtype=dtype, device=device, max_batch_size=batch_size),
            report=lambda line: console.print(line, highlight=False),
            progress=progress,
        )
        _write_pages(record, output, f"dmax sweep: {task}")
    if as_json:
        print_json(record)
    else:
        sys.stdout.write(f"{output / 'report.html'}\n")


def _write_pages(record: SweepRecord, output: Path, title: str) -> None:
    """The plots and the report of a sweep."""
    from dmax.evaluation.plots import draw
    from dmax.evaluation.report import page
    from dmax.files import write_atomically

    for name in ("plot.svg", "plot.png"):
        draw(record, output / name)
    write_atomically(output / "report.html", page(record, title))
