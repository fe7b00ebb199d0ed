"""What came after DMax, in miniature: objectives that go on from the bundled models.

    python bench/beyond.py                        # train what is missing, measure, write the page
    python bench/beyond.py --only mmd --seeds 2   # one objective, one seed
    python bench/beyond.py --no-training          # measure what lies under runs/, write the page
    python bench/beyond.py --gpu --jobs 16        # train on a GPU, 16 runs side by side

Every run is trained from its recipe and decoded by SPD and by MBD at five thresholds, 500 unseen
problems each. All goes on where it was interrupted: finished models are not trained again, and
points of the record are not measured again. What is not there yet is listed as not measured.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import side_by_side
from beyond_page import TEMPLATE, write_page
from beyond_runs import BASE, DMAX, SEEDS, TRAINED, Run, chosen
from command_line import check_page, check_plots, count, num_answered, telling
from sweeps import open_llm, sweep

from dmax.errors import InputError
from dmax.evaluation.sweep import Curve
from dmax.files import check_ours, read_record, write_atomically
from dmax.llm import LLM
from dmax.recipe.run import run_recipe
from dmax.recipe.sections import Recipe, load_recipe

TOY: dict[str, Any] = {
    "max_steps": 2,
    "warmup_steps": 0,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "disable_tqdm": True,
}


def recipe_of(run: Run, seed: int, options: argparse.Namespace) -> Recipe:
    """The recipe of a run; what it names under `runs/` lies under `options.runs`."""
    root = options.runs
    changes = {"seed": seed, "use_cpu": not options.gpu} | (TOY if options.toy else {})
    recipe = load_recipe(run.path, run.overrides | changes)
    data = replace(recipe.data, file=str(moved(recipe.data.file or "", root)))
    return replace(recipe, data=data, output_dir=root / run.folder(seed))


def moved(path: str, root: Path) -> Path:
    """A path under `runs/`, under `root` instead."""
    return root / Path(path).relative_to("runs")


def data_command(recipe: Path, root: Path, toy: bool) -> list[str]:
    """The command that stands beside a recipe's data and makes it, as arguments of Python."""
    (line,) = re.findall(r"# dmax (distill .*--output \S+)", recipe.read_text(encoding="utf-8"))
    words = shlex.split(line)
    place = words.index("--output") + 1
    words[place] = str(moved(words[place], root))
    if toy:
        words[words.index("--num") + 1] = "8"
    return ["-m", "dmax", *words]


def make_data(run: Run, root: Path, toy: bool) -> None:
    """Make a run's data, or go on with it where that was interrupted.

    Raises:
        InputError: the command that makes it has failed, and has said why.
    """
    command = data_command(run.path, root, toy)
    output = Path(command[command.index("--output") + 1])
    if num_answered(output) >= int(command[command.index("--num") + 1]):
        return
    ended = subprocess.run([sys.executable, *command], check=False)
    if ended.returncode:
        raise InputError(
            f"the data of {run.label} could not be made: `python {shlex.join(command)}` "
            f"ended with exit code {ended.returncode}"
        )


def train(run: Run, seed: int, options: argparse.Namespace) -> None:
    """Train a run unless that is done; its data is there."""
    recipe = recipe_of(run, seed, options)
    print(f"training {recipe.output_dir.name}", flush=True)
    run_recipe(recipe, report=print)


def do(run: Run, seed: int, options: argparse.Namespace, output: Path) -> None:
    """Train a run and measure it, as far as that is not done."""
    if run.path.is_file() and not options.no_training:
        train(run, seed, options)
    folder = options.runs / run.folder(seed)
    if (folder / "config.json").is_file():
        curves = [run.curve(name, seed) for name in run.decodings]
        measure(curves, options.runs, output, options.limit)
        note_training(run, seed, folder, output)


def do_bundled(options: argparse.Namespace, output: Path) -> None:
    """Measure the models that the runs begin from."""
    for run in (BASE, DMAX):
        measure([run.curve(name) for name in run.decodings], options.runs, output, options.limit)


def do_part(
    run: Run | None, seed: int, options: argparse.Namespace, whole: Path
) -> list[side_by_side.Pair]:
    """A run, or the bundled models, with a record beside the `whole` one."""
    part = options.runs / "beyond" / (f"{run.name}-{seed}.json" if run else "bundled.json")
    side_by_side.begin(part, whole)
    if run:
        do(run, seed, options, part)
    else:
        do_bundled(options, part)
    return [(part, whole)]


def measure(curves: Sequence[Curve], root: Path, output: Path, limit: int) -> None:
    """Decode what the record does not have yet; models that are not bundled lie under `root`."""
    bundled = {BASE.start, DMAX.start}

    def open_model(name: str) -> LLM:
        return open_llm(name if name in bundled else str(root / name))

    sweep(curves, output, limit, open_model=open_model)


def note_training(run: Run, seed: int, folder: Path, output: Path) -> None:
    """Keep beside the points what a checkpoint says of its training."""
    said = json.loads((folder / "dmax.json").read_text(encoding="utf-8"))
    record = read_record(output)
    kept = ("recipe", "steps", "seconds", "precision", "environment")
    trained = {name: said[name] for name in kept if name in said}
    size = load_recipe(run.path).training["per_device_train_batch_size"]
    record.setdefault("training", {})[f"{run.name}-{seed}"] = trained | {"batch_size": size}
    write_atomically(output, json.dumps(record, indent=1) + "\n")


@telling()
def main(arguments: Sequence[str] | None = None) -> None:
    """Train and measure what is missing; write the page and its plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [run.name for run in TRAINED]
    parser.add_argument("--only", nargs="+", choices=names, default=[], help="objectives")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    parser.add_argument("--limit", type=count, default=500, help="problems for a point")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="of data and checkpoints")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--no-training", action="store_true", help="measure what is there")
    parser.add_argument("--toy", action="store_true", help="two steps a run: does all fit?")
    side_by_side.add_options(parser)
    options = parser.parse_args(arguments)
    side_by_side.check_options(parser, options)
    check_plots(parser)
    output = options.output / "beyond.json"
    check_ours(output, "points")
    check_page(options.output / "beyond.md", TEMPLATE)

    runs = list(chosen(options.only, tuple(dict.fromkeys(options.seeds))))
    if not options.no_training:
        for run in dict.fromkeys(run for run, _ in runs):
            make_data(run, options.runs, options.toy)
    if options.jobs > 1:
        work: dict[str, side_by_side.Work] = {
            "the bundled models": (do_part, (None, 0, options, output))
        }
        work |= {
            f"{run.name}-{seed}": (do_part, (run, seed, options, output)) for run, seed in runs
        }
        side_by_side.do(work, options.jobs)
    else:
        do_bundled(options, output)
        for run, seed in runs:
            do(run, seed, options, output)
    write_page(read_record(output), options.output)


if __name__ == "__main__":
    main()
