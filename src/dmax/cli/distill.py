"""`dmax distill`: its options, and what is made of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmax.cli import options, replicas
from dmax.cli.boundary import keeping
from dmax.cli.terminal import doing, long_progress, print_json
from dmax.errors import InputError
from dmax.params import MOST_PROBLEMS

if TYPE_CHECKING:
    from dmax.distill.prompts import Questions
    from dmax.distill.responses import Answerer
    from dmax.distill.run import Report
    from dmax.records.sources import Source

PROMPTS = "Prompts"
FILES = "Files"
FILTERS = "Filters"
SERVER = "A server in place of --model"
OF_THE_MODEL = (
    "model strategy threshold block_length batch_size dtype quantization compile_model device "
    "ray ray_address replicas gpus_per_replica engine"
).split()
OF_THE_SERVER = "endpoint_model concurrency timeout".split()
ELSEWHERE = "endpoint ray ray_address".split()
"""Who answers in the place of a model in this process."""


def _option(help: str, panel: str, *names: str, **bounds: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **bounds)


Output = Annotated[
    Path, _option("JSONL, or folder; an existing one is continued", FILES, "--output", "-o")
]
ShardSize = Annotated[
    int | None, _option("make it a folder of files with so many responses each", FILES, min=1)
]
Trajectories = Annotated[
    bool,
    _option("also record every step of the decoding, for CForce", FILES, "--trajectories"),
]
Num = Annotated[
    int | None,
    _option(
        "prompts to answer (default: 1000 problems, or all of a file)",
        PROMPTS,
        min=1,
        max=MOST_PROBLEMS,
    ),
]
Prompts = Annotated[
    str | None, _option("file, folder or id on the hub, in place of problems", PROMPTS)
]
ReaderName = Annotated[str | None, _option("of its columns (docs/training.md)", PROMPTS)]
Column = Annotated[str | None, _option("the one with the prompts, if no reader knows it", PROMPTS)]
Config = Annotated[str | None, _option("of a data set that has several", PROMPTS)]
Split = Annotated[str, _option("of a data set", PROMPTS)]
TaskName = Annotated[str | None, _option("a task (docs/tasks.md) that --data has rows of", PROMPTS)]
Data = Annotated[Path | None, _option("JSONL of the task's training rows", PROMPTS)]
Seed = Annotated[int, _option("of the problems", PROMPTS, min=0, max=options.LARGEST_SEED)]
PartOf = Annotated[str, _option("INDEX/COUNT: one share of the prompts, from 0", PROMPTS)]
StrategyOptions = Annotated[
    list[str] | None,
    typer.Option("--option", help="NAME=VALUE of the strategy, or of a request; repeat for more"),
]
MinLength = Annotated[int, _option("tokens that a response must have", FILTERS)]
MaxLength = Annotated[int | None, _option("tokens that a response may have", FILTERS)]
MaxRepetition = Annotated[float | None, _option("share of it that may repeat, as 0.5", FILTERS)]
FilterScore = Annotated[bool, _option("keep right answers only", FILTERS, "--filter-score")]
Address = Annotated[str | None, _option("http://…/v1; its key: OPENAI_API_KEY", SERVER)]
ServedModel = Annotated[str | None, _option("which one it serves (default: the only one)", SERVER)]
Concurrency = Annotated[int, _option("requests in flight", SERVER)]
Timeout = Annotated[float, _option("seconds that the server may be silent", SERVER)]


def distill(
    context: typer.Context,
    output: Output,
    model: options.ModelName = "tiny-base",
    num: Num = None,
    prompts: Prompts = None,
    reader: ReaderName = None,
    column: Column = None,
    config: Config = None,
    split: Split = "train",
    task: TaskName = None,
    data: Data = None,
    seed: Seed = 1,
    part: PartOf = "0/1",
    shard_size: ShardSize = None,
    trajectories: Trajectories = False,
    strategy: options.StrategyName = "threshold",
    threshold: options.Threshold = 0.95,
    max_new_tokens: options.MaxNewTokens = options.DECODING.max_new_tokens,
    option: StrategyOptions = None,
    block_length: options.BlockLength = None,
    batch_size: options.BatchSize = 64,
    dtype: options.Dtype = "auto",
    quantization: options.Quantization = None,
    compile_model: options.CompileModel = False,
    device: options.Device = "auto",
    ray: options.Ray = False,
    ray_address: options.RayAddress = None,
    replicas: options.NumReplicas = None,
    gpus_per_replica: options.GpusPerReplica = None,
    engine: options.EngineName = None,
    min_length: MinLength = 0,
    max_length: MaxLength = None,
    max_repetition: MaxRepetition = None,
    filter_score: FilterScore = False,
    endpoint: Address = None,
    endpoint_model: ServedModel = None,
    concurrency: Concurrency = 64,
    timeout: Timeout = 600.0,
    as_json: options.AsJson = False,
) -> None:
    """Write a model's own responses to training prompts: the data that OPUT learns from.

    Example: dmax distill --model tiny-base --num 20000 --output runs/tiny_responses.jsonl
    """
    _check_who_answers(context, endpoint)
    # Paths by themselves: in older releases of typer the context holds them as texts.
    given = context.params | {"output": output, "data": data}
    _write(_run(given), output, as_json=as_json)


def _run(given: Mapping[str, Any]) -> Report:
    """The distillation that the options of the command ask for."""
    output: Path = given["output"]
    with ExitStack() as stack:
        with doing(f"loading {given['endpoint'] or given['model']}"):
            from dmax.distill.files import ResponseFiles
            from dmax.distill.filters import Filters
            from dmax.distill.prompts import read_part
            from dmax.distill.run import distill as run_distill

            files = ResponseFiles(output, given["shard_size"], read_part(given["part"]))
            files.check()
            lengths = given["min_length"], given["max_length"]
            filters = Filters(*lengths, given["max_repetition"])
            open_answerer = _server(given) if given["endpoint"] else _engine(given)
            source = _source(given["prompts"], given["config"], given["split"])
            names = ("task", "data", "num", "seed")
            others = {name: given[name] for name in names}
            questions = _questions(source, given["reader"], given["column"], **others)
            filters = questions.scored(filters) if given["filter_score"] else filters
            files.read(questions.prompts)
            answerer = stack.enter_context(open_answerer())
        kept = f"finished responses are kept in {output}, and the same command goes on"
        with keeping(kept), long_progress("distilling") as progress:
            return run_distill(answerer, questions.prompts, files, filters, progress=progress)


def _check_who_answers(context: typer.Context, endpoint: str | None) -> None:
    """Make sure that no option speaks of the one who does not answer.

    Raises:
        InputError: one does.
    """
    elsewhere = options.given_among(context, ELSEWHERE)
    if elsewhere and context.params["trajectories"]:
        raise InputError(
            f"`--trajectories` does not go with {elsewhere}: only a model in this process tells "
            "how it decodes",
            hint="leave one of them out; --part divides the prompts among processes",
        )
    strange = options.given_among(context, OF_THE_MODEL if endpoint else OF_THE_SERVER)
    if strange and endpoint:
        raise InputError(
            f"`{strange}` does not go with --endpoint: the server decides over it",
            hint="--option NAME=VALUE adds a field to its requests",
        )
    if strange:
        raise InputError(f"`{strange}` goes with --endpoint only")


def _source(prompts: str | None, config: str | None, split: str) -> Source | None:
    """Where the prompts are, if not in a task."""
    from dmax.records.sources import find_source

    return None if prompts is None else find_source(prompts, config=config, split=split)


def _questions(
    source: Source | None, reader: str | None, column: str | None, **others: Any
) -> Questions:
    """The prompts of a source or of a task, as `read_questions` reads them."""
    from dmax.distill.prompts import read_questions
    from dmax.records.readers import get_reader

    columns = {"prompt": column} if column is not None else None
    return read_questions(source, get_reader(reader, columns), **others)


def _engine(given: Mapping[str, Any]) -> Callable[[], AbstractContextManager[Answerer]]:
    """What loads the model that answers, or replicas of it; settings are checked at once.

    Raises:
        InputError: a wrong setting, or no such model.
    """
    from dmax.distill.model import ModelAnswerer
    from dmax.hub import find_folder
    from dmax.llm import LLM

    names = ("strategy", "threshold", "max_new_tokens", "option", "block_length")
    params = options.decoding_params(**{name: given[name] for name in names})
    if asked := replicas.read(given):
        return partial(asked.answering, params)
    find_folder(given["model"])  # a million problems take minutes to draw

    def load() -> AbstractContextManager[Answerer]:
        engine = {name: given[name] for name in ("dtype", "device", "quantization")}
        llm = LLM(
            given["model"],
            **engine,
            max_batch_size=given["batch_size"],
            compile_model=given["compile_model"],
        )
        return nullcontext(ModelAnswerer(llm, params, records=given["trajectories"]))

    return load


def _server(given: Mapping[str, Any]) -> Callable[[], AbstractContextManager[Answerer]]:
    """What reaches the server that answers; its settings are checked at once.

    Raises:
        InputError: a wrong setting, or no address.
    """
    from dmax.distill.server import ServerAnswerer, ServerOptions

    chosen = ServerOptions(
        url=given["endpoint"],
        model=given["endpoint_model"],
        concurrency=given["concurrency"],
        timeout=given["timeout"],
        max_new_tokens=given["max_new_tokens"],
        fields=options.named_values(given["option"] or []),
    )
    return lambda: nullcontext(ServerAnswerer(chosen))


def _write(report: Report, output: Path, *, as_json: bool) -> None:
    """What came of it, on one line."""
    if as_json:
        print_json({"output": str(output), **asdict(report)})
        return
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(report.dropped.items()))
    num_dropped = sum(report.dropped.values())
    dropped = f"{num_dropped:,} dropped ({reasons})" if num_dropped else "none dropped"
    parts = [f"{report.kept:,} responses, {dropped}"]
    if report.tokens:
        parts.append(f"{report.tokens:,} tokens, {report.tokens_per_second:,.0f} tokens/s")
    if report.tpf is not None:
        parts.append(f"TPF {report.tpf:.2f}")
    sys.stdout.write(f"{output}: {'; '.join(parts)}\n")
