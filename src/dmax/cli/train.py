"""`dmax train`: what it takes, and what it says in the end."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from dmax import extras
from dmax.cli import options
from dmax.cli.boundary import keeping
from dmax.cli.terminal import console, doing, print_json


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
    as_json: options.AsJson = False,
) -> None:
    """Train as a recipe says.

    An interrupted run continues from its last checkpoint. A finished run is left as it is.

    Example: dmax train recipes/tiny_oput_soft.yaml
    """
    extras.require("accelerate", "train", "training")
    with doing(f"reading {recipe}"):
        from dmax.recipe.run import run_recipe
        from dmax.recipe.sections import load_recipe

        overrides = {} if max_steps is None else {"max_steps": max_steps}
        checked = load_recipe(recipe, overrides)
    kept = "checkpoints are kept, and the same command goes on from the last one"
    # The Trainer prints its log; stdout is for the result.
    with keeping(kept), redirect_stdout(sys.stderr):
        folder = run_recipe(checked, resume=not fresh, report=console.print)
    if console.quiet:  # another process speaks
        return
    if as_json:
        print_json({"checkpoint": str(folder)})
    else:
        sys.stdout.write(f"{folder}\n")
