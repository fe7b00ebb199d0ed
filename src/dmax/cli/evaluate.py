"""`dmax eval`: its options, and what is made of them."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

import typer

from dmax.cli import options, replicas
from dmax.cli.boundary import keeping
from dmax.cli.terminal import console, doing, in_words, print_json, progress_bar
from dmax.outputs import as_record

if TYPE_CHECKING:
    from dmax.completers import Completer
    from dmax.evaluation.results import ResultFiles
    from dmax.evaluation.run import Summary
    from dmax.llm import LLM
    from dmax.params import DecodingParams
    from dmax.tasks import Task


def evaluate(
    context: typer.Context,
    model: options.ModelName = "tiny-dmax",
    task: options.TaskName = "word_problems",
    data: options.DataFile = None,
    strategy: options.StrategyName = options.DECODING.strategy,
    threshold: options.Threshold = None,
    limit: options.Limit = 200,
    seed: options.Seed = 7,
    max_new_tokens: options.TaskMaxNewTokens = None,
    top_k: options.TopK = options.DECODING.top_k,
    option: options.StrategyOptions = None,
    block_length: options.BlockLength = None,
    batch_size: options.BatchSize = options.ENGINE.max_batch_size,
    dtype: options.Dtype = "auto",
    quantization: options.Quantization = None,
    compile_model: options.CompileModel = False,
    device: options.Device = "auto",
    ray: options.Ray = False,
    ray_address: options.RayAddress = None,
    replicas: options.NumReplicas = None,
    gpus_per_replica: options.GpusPerReplica = None,
    engine: options.EngineName = None,
    output: options.SummaryFile = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure accuracy, tokens per forward and speed on a task.

    With --output, an interrupted run goes on where it stopped.

    Example: dmax eval --model tiny-dmax --strategy spd --threshold 0.5 --limit 200 --seed 7
    """
    # Paths by themselves: in older releases of typer the context holds them as texts.
    summary = _run(context.params | {"output": output, "data": data})
    if as_json:
        print_json(as_record(summary))
    else:
        sys.stdout.write(in_words(summary))


def _run(given: dict[str, Any]) -> Summary:
    """The evaluation that the options of the command ask for."""
    model: str = given["model"]
    with ExitStack() as stack:
        with doing(f"loading {model}"):
            from dmax.evaluation.results import ResultFiles
            from dmax.llm import LLM
            from dmax.tasks import get_task

            task = get_task(given["task"], given["data"])
            params = _params(given, task)
            output, overwrite = given["output"], given["overwrite"]
            files = None
            if output:
                files = ResultFiles(output, overwrite=overwrite, report=console.print)
            asked = replicas.read(given)
            completer: LLM | Completer
            if asked:
                completer = stack.enter_context(asked.completing(params))
            else:
                completer = LLM(
                    model,
                    dtype=given["dtype"],
                    device=given["device"],
                    quantization=cast(Any, given["quantization"]),
                    max_batch_size=given["batch_size"],
                    compile_model=given["compile_model"],
                )
        kept = "nothing is kept without --output"
        if files:
            kept = f"finished samples are kept in {files.partial}, and the same command goes on"
        with keeping(kept):
            return _measure(completer, task, params, files, given)


def _params(given: dict[str, Any], task: Task) -> DecodingParams:
    """How the examples of a task are decoded."""
    longest = given["max_new_tokens"]
    names = "strategy threshold top_k option block_length".split()
    return options.decoding_params(
        max_new_tokens=task.max_new_tokens if longest is None else longest,
        **{name: given[name] for name in names},
    )


def _measure(
    model: LLM | Completer,
    task: Task,
    params: DecodingParams,
    files: ResultFiles | None,
    given: dict[str, Any],
) -> Summary:
    """Run an evaluation with a progress bar, and write its files if there are any."""
    from dmax.evaluation.run import evaluate as run_evaluation

    with progress_bar(f"{given['model']} on {task.name}") as progress:
        summary, samples = run_evaluation(
            model,
            task,
            params,
            limit=given["limit"],
            seed=given["seed"],
            model_name=given["model"],
            progress=progress,
            journal=files,
        )
    if files:
        files.finish(summary, samples)
    return summary
