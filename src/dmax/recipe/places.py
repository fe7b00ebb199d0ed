"""Where a run writes, and what it reads that must not lie there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from dmax.recipe.file import RecipeFile


def run_dir(output_dir: Path) -> Path:
    """The folder of a run's checkpoints, beside that of its result."""
    return output_dir.with_name(output_dir.name + "-run")


def check_places(file: RecipeFile, output_dir: Path, inputs: Mapping[str, str | None]) -> None:
    """Make sure that a run neither replaces nor removes what it starts from and learns.

    Args:
        file: the recipe.
        output_dir: of the result.
        inputs: what is read, by key of the recipe: "model.path" and files of data.

    Raises:
        InputError: the model or the data lies where the run writes.
    """
    model = inputs["model.path"]
    if model is not None and _real(model) == _real(output_dir):
        raise file.wrong("output_dir", "`output_dir` is the folder of the model to start from")
    folder = run_dir(output_dir)
    for key, path in inputs.items():
        if path is not None and _is_in(path, folder):
            raise file.wrong(
                key,
                f"`{key}` lies in {folder}, where this run keeps its checkpoints and --fresh "
                "removes those of an earlier one",
                hint="choose another `output_dir`, or copy it to another folder",
            )


def _is_in(path: str, folder: Path) -> bool:
    """Whether something is there at a path, within a folder; names on the hub are no paths."""
    if not os.path.exists(os.path.expanduser(path)):
        return False
    real = Path(_real(folder))
    return real in (Path(_real(path)), *Path(_real(path)).parents)


def _real(path: str | Path) -> str:
    return os.path.realpath(os.path.expanduser(path))
