"""`dmax train`: what it takes, and what it says in the end."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from dmax import extras
from dmax.cli import options
from dmax.cli.boundary import Stopped, keeping
from dmax.cli.terminal import console, doing, print_json
from dmax.errors import InputError


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see recipes/")],
    max_steps: Annotated[
        int | None, typer.Option(help="stop after this many steps instead", min=1)
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="start over: drop an earlier run's checkpoints, replace its result"
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="only say what memory, time and money it would take"),
    ] = False,
    gpus: Annotated[int | None, typer.Option(help="of a dry run: how many")] = None,
    gpu: Annotated[str | None, typer.Option(help="of a dry run: h100, h200, a100, …")] = None,
    memory: Annotated[float | None, typer.Option(help="of a dry run: GB of each GPU")] = None,
    price: Annotated[float | None, typer.Option(help="of a dry run: $ of a GPU's hour")] = None,
    examples: Annotated[int | None, typer.Option(help="of a dry run: how many to learn")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Train as a recipe says.

    An interrupted run continues from its last checkpoint. A finished run is left as it is.

    Example: dmax train recipes/tiny_oput_soft.yaml
    """
    extras.require("accelerate", "train", "training")
    overrides = {} if max_steps is None else {"max_steps": max_steps}
    cluster = {"gpus": gpus, "gpu": gpu, "memory": memory, "price": price, "examples": examples}
    given = {name: value for name, value in cluster.items() if value is not None}
    if dry_run:
        _estimate(recipe, overrides, given, as_json=as_json)
        return
    if given:
        raise InputError(f"`--{next(iter(given))}` belongs to `--dry-run`")
    with doing(f"reading {recipe}"):
        from dmax.recipe.places import run_dir
        from dmax.recipe.run import run_recipe
        from dmax.recipe.sections import load_recipe

        checked = load_recipe(recipe, overrides)
        checkpoints = run_dir(checked.output_dir)
        dropped = _written(checkpoints) if fresh else set()
    try:
        with redirect_stdout(sys.stderr):  # where the Trainer prints its log, not to the result
            folder = run_recipe(checked, resume=not fresh, report=console.print)
            _leave_group()
    except (KeyboardInterrupt, Stopped):
        with keeping(_kept(_written(checkpoints) - dropped, fresh=fresh)):
            raise
    if console.quiet:  # another process speaks
        return
    if as_json:
        print_json({"checkpoint": str(folder)})
    else:
        sys.stdout.write(f"{folder}\n")


def _written(folder: Path) -> set[tuple[Path, int]]:
    """The checkpoints of a run that were written to their end, and when."""
    ends = folder.glob("checkpoint-*/trainer_state.json")
    return {(end, end.stat().st_mtime_ns) for end in ends}


def _kept(written: set[tuple[Path, int]], *, fresh: bool) -> str:
    """What is left of an interrupted run, and what goes on with it."""
    if not written:
        return "there is no checkpoint of this run yet, and the same command starts over"
    command = "the same command without --fresh" if fresh else "the same command"
    return f"checkpoints are kept, and {command} goes on from the last one"


def _leave_group() -> None:
    """Close what connects the ranks of torchrun, while all of them are here.

    Left open it has threads of its own when Python ends, which may abort the process.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _estimate(
    recipe: Path, overrides: dict[str, Any], given: dict[str, Any], *, as_json: bool
) -> None:
    """Say what a recipe takes on GPUs that need not be here; nothing is written."""
    with doing(f"counting a step of {recipe}"):
        from dmax.benchmark.report import console as open_console
        from dmax.cli.estimate import show_estimate
        from dmax.recipe.estimate import estimate
        from dmax.recipe.estimate.cluster import Cluster
        from dmax.recipe.sections import load_recipe

        cluster = Cluster.of(
            given.get("gpus", 1),
            given.get("gpu", "h100"),
            memory=given.get("memory"),
            price=given.get("price"),
        )
        checked = load_recipe(recipe, overrides | {"use_cpu": True}, elsewhere=True)
        found = estimate(checked, cluster, examples=given.get("examples"))
    if as_json:
        print_json(found.record())
    else:
        show_estimate(found, open_console())
