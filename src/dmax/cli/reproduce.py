"""`dmax reproduce`: a published table measured anew, cell by cell."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmax.cli import options
from dmax.cli.boundary import Stopped, keeping
from dmax.cli.terminal import console, doing, print_json, progress_bar
from dmax.errors import InputError, did_you_mean, show
from dmax.params import MOST, check_number

if TYPE_CHECKING:
    from dmax.reproduce.engines import EngineChoice
    from dmax.reproduce.folder import TableFolder
    from dmax.reproduce.plan import Plan
    from dmax.reproduce.table import Table


TableName = Annotated[
    str | None, typer.Argument(help="name of a table (--list), or a YAML file of one")
]
ListTables = Annotated[bool, typer.Option("--list", help="show the tables that there are")]
Engine = Annotated[
    str | None, typer.Option(help="dmax, vllm or sglang (default: dmax, or the table's own)")
]
EngineOptions = Annotated[
    list[str] | None,
    typer.Option(help="NAME=VALUE, a further argument of vLLM or SGLang; repeat for more"),
]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", help="a row or a benchmark of the table; repeat for more"),
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", "-m", help="NAME=FOLDER in place of a checkpoint; repeat for more"),
]
Files = Annotated[
    list[str] | None,
    typer.Option("--data", help="BENCHMARK=FILE in place of the hub's rows; repeat for more"),
]
TrialLimit = Annotated[
    int | None,
    typer.Option(help="examples of each benchmark, for a trial", min=1, max=options.MOST_EXAMPLES),
]
TrialLength = Annotated[
    int | None, typer.Option(help="longest completion, for a trial (default: the table's)")
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        help="sequences decoded together (default: the table's)", min=1, max=options.LARGEST_BATCH
    ),
]
Trial = Annotated[
    bool, typer.Option("--trial", help="without the engine and the GPUs that a table is about")
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="folder (default: runs/reproduce-TABLE)")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="forget what the folder holds")]


def reproduce(
    table: TableName = None,
    list_tables: ListTables = False,
    engine: Engine = None,
    engine_option: EngineOptions = None,
    only: Only = None,
    model: Models = None,
    data: Files = None,
    limit: TrialLimit = None,
    max_new_tokens: TrialLength = None,
    batch_size: BatchSize = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    trial: Trial = False,
    output: Output = None,
    overwrite: Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure a published table anew, every cell beside its published value.

    An interrupted run goes on where it stopped, and a later one adds cells to the same folder.

    Example: dmax reproduce table1 --only gsm8k --only dmax-math
    """
    with doing("loading the tables"):
        from dmax.reproduce.folder import TableFolder
        from dmax.reproduce.plan import Plan
        from dmax.reproduce.run import TableRun
        from dmax.reproduce.table import load_table

    if list_tables:
        _show_tables(as_json=as_json)
        return
    if table is None:
        raise InputError("no table named", hint="dmax reproduce --list shows what there is")
    chosen = load_table(table)
    plan = Plan(
        chosen,
        _engine(chosen, engine, engine_option or [], batch_size, dtype, device),
        models=named_paths("--model", model or []),
        data=named_paths("--data", data or []),
        only=only or [],
        limit=limit,
        max_new_tokens=max_new_tokens,
        is_trial=trial,
    )
    plan.check()
    path = output or Path("runs") / f"reproduce-{chosen.name}"
    folder = TableFolder(path, plan.settings(), overwrite=overwrite, report=console.print)
    try:
        TableRun(plan, folder, progress_bar, lambda: _write_pages(chosen, folder)).run()
    except (KeyboardInterrupt, Stopped):
        with keeping(_kept(folder, overwrite=overwrite)):
            raise
    _show(chosen, folder, as_json=as_json)
    _check_any_measured(plan, folder)


def _kept(folder: TableFolder, *, overwrite: bool) -> str:
    """What is left of an interrupted run, and what goes on with it."""
    if folder.is_to_be_emptied:
        return f"nothing in {folder.path} was changed, and the same command starts over"
    command = "the same command without --overwrite" if overwrite else "the same command"
    return f"finished samples are kept in {folder.path}, and {command} goes on"


def _check_any_measured(plan: Plan, folder: TableFolder) -> None:
    """Raise `InputError` if not one of the cells that were asked for could be measured."""
    from dmax.reproduce.table import CANNOT_RUN

    held = [folder.cell(cell) or {} for cell in plan.chosen()]
    if all(each.get("status") == CANNOT_RUN for each in held):
        raise InputError(f"no cell could be measured: {held[0]['reason']}", held[0]["hint"])


def _engine(
    table: Table,
    name: str | None,
    texts: list[str],
    batch_size: int | None,
    dtype: str,
    device: str,
) -> EngineChoice:
    """The engine that was asked for, else the one that the table is about, else dmax's own."""
    from dmax.reproduce.engines import EngineChoice
    from dmax.reproduce.table import ENGINES, Requirement

    needs = table.requires or Requirement()
    name = name or needs.engine
    if name not in ENGINES:
        raise InputError(
            f"unknown engine {show(name)}; choose from {', '.join(ENGINES)}",
            hint=did_you_mean(name, ENGINES),
        )
    given = options.named_values(texts, "--engine-option")
    usual = needs.tensor_parallel if name == needs.engine else 1
    num_gpus = given.pop("tensor_parallel_size", usual)
    check_number("tensor_parallel_size", num_gpus, low=1, high=MOST, whole=True)
    size = batch_size or table.batch_size
    return EngineChoice(name, size, dtype, device, num_gpus, tuple(given.items()))


def named_paths(option: str, texts: list[str]) -> dict[str, str]:
    """Texts `NAME=PATH` as a dictionary.

    Raises:
        InputError: a text of another form, or a name that stands twice.
    """
    paths: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise InputError(f"`{option}` must be NAME=PATH, got {show(text)}")
        if name in paths:
            raise InputError(f"`{option}` names {show(name)} twice")
        paths[name] = path
    return paths


def _show_tables(*, as_json: bool) -> None:
    from dmax.reproduce.table import load_table, table_names

    tables = [load_table(name) for name in table_names()]
    if as_json:
        print_json([_about(table) for table in tables])
        return
    for table in tables:
        about = _about(table)
        needs = f", needs {about['needs']}" if about["needs"] else ""
        sys.stdout.write(f"{table.name}: {table.title} ({about['cells']} cells{needs})\n")
        for name in ("source", "rows", "benchmarks", "checkpoints"):
            value = about[name]
            sys.stdout.write(f"  {name}: {value if name == 'source' else ', '.join(value)}\n")


def _about(table: Table) -> dict[str, Any]:
    needs = table.requires
    return {
        "name": table.name,
        "title": table.title,
        "source": table.source,
        "cells": sum(1 for _ in table.cells()),
        "needs": needs and f"{needs.engine} and {needs.tensor_parallel} GPUs",
        "rows": list(table.rows),
        "benchmarks": list(table.benchmarks),
        "checkpoints": [
            f"{name} ({source.hub or 'not available'})" for name, source in table.models.items()
        ],
    }


def _records(table: Table, folder: TableFolder) -> dict[str, dict[str, Any]]:
    """What the folder knows of every cell, by its name."""
    found = ((cell.name, folder.cell(cell)) for cell in table.cells())
    return {name: record for name, record in found if record is not None}


def _write_pages(table: Table, folder: TableFolder) -> dict[str, dict[str, Any]]:
    """Write the pages of what is known so far."""
    from dmax.reproduce.page import html, markdown

    records = _records(table, folder)
    folder.write_report("report.md", markdown(table, records))
    folder.write_report("report.html", html(table, records))
    return records


def _show(table: Table, folder: TableFolder, *, as_json: bool) -> None:
    from dmax.reproduce.page import cells_of, lines

    records = _write_pages(table, folder)
    if as_json:
        cells = [dict(record) for _, _, record in cells_of(table, records)]
        print_json({"table": table.name, "cells": cells})
        return
    sys.stdout.write("\n".join(lines(table, records)) + "\n")
    sys.stdout.write(f"\n{folder.path / 'report.html'}\n")
