"""When does on-policy noise matter? Own tokens against random ones, over steps and learning rates.

    python bench/noise.py                           # all of it: a day of one core
    python bench/noise.py --seeds 1 --minutes 10    # a part of it; every later call goes on
    python bench/noise.py --page                    # only write the page from what is measured
    python bench/noise.py --gpu --jobs 16           # train on a GPU, 16 runs side by side

    python bench/noise.py --study noise_pretrained  # on the base that bench/pretrained.py makes

The designs, written before any result, stand in `noise_plan.py` and on the pages.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

import side_by_side
import torch
from ablation_training import make_responses
from command_line import amount, check_plots, count, seed, telling
from noise_kinds import NOISES, OF_TRAINED, look_at, token_kinds
from noise_page import write_page
from noise_plan import (
    BASE,
    BUNDLED,
    CAREFUL,
    DESIGNS,
    LIMIT,
    LOOKED_AT,
    RATIOS,
    SCHEDULE,
    SEEDS,
    THRESHOLDS,
    Design,
    Run,
    Stage,
    base_label,
    plan,
)
from transformers import set_seed

from dmax.checkpoint import Checkpoint, load_checkpoint
from dmax.environment import environment, weights_digest
from dmax.errors import InputError
from dmax.evaluation.sweep import Curve, run_sweep
from dmax.files import read_record, write_atomically
from dmax.llm import LLM
from dmax.recipe.arguments import make_arguments
from dmax.recipe.build import build_checkpoint, data_digest, encode_data, read_data
from dmax.recipe.folder import RECORD, RunFolder
from dmax.recipe.sections import Recipe
from dmax.tasks import get_task
from dmax.training.data import Collator
from dmax.training.objectives import ObjectiveModule
from dmax.training.trainer import DMaxTrainer


class Study:
    """Trains and measures the stages, each kept as soon as it is known.

    Args:
        recipe: trains the base with OPUT; the study changes its schedule, rate, seed and objective.
        runs: folder of the training runs.
        output: folder of the records.
        name: what the records are called.
        task: what is decoded.
        held_out: how many examples at the end of the data are not learnt but looked at.
        num_examples: of the data, from its start; None: all.
        limit: how many problems are decoded.
        device: where models are looked at.
    """

    def __init__(
        self,
        recipe: Recipe,
        runs: Path,
        output: Path,
        name: str,
        *,
        task: str,
        held_out: int,
        num_examples: int | None = None,
        limit: int = LIMIT,
        device: str = "cpu",
    ) -> None:
        self.recipe = recipe
        self.runs = runs
        self.points = output / f"{name}.json"
        self.looks = output / f"{name}_tokens.json"
        self.task = get_task(task)
        self.limit = limit
        self.held_out = held_out
        self.num_examples = num_examples
        self.device = device

    @cached_property
    def base(self) -> Checkpoint:
        """The model that all runs start from."""
        return self._load(self.recipe.model.path or "")

    @cached_property
    def examples(self) -> Any:
        """The data as token ids, a `datasets.Dataset`."""
        examples = encode_data(self.recipe.data, read_data(self.recipe.data), self.base)
        if self.num_examples is None:
            return examples
        return examples.select(range(min(self.num_examples, len(examples))))

    def run(self, stages: Sequence[Stage], *, minutes: float = inf) -> None:
        """Train and measure what is missing, until the time is over; a begun stage is finished."""
        end = time.monotonic() + 60 * minutes
        self.measure_base()
        for run, steps in stages:
            if self.is_measured(run, steps):
                continue
            if time.monotonic() > end:
                break
            checkpoint = self.train(run, steps)
            if run.seed == SEEDS[0] and steps in LOOKED_AT:
                self.look_at(run.label(steps), checkpoint)
            self.decode(run, steps, checkpoint)
            self.keep_seconds(run, checkpoint)

    def is_measured(self, run: Run, steps: int) -> bool:
        """Whether all points of a stage are in the record."""
        points = _read(self.points).get("points", [])
        held = {point["value"] for point in points if point["label"] == run.label(steps)}
        return held >= set(THRESHOLDS)

    def train(self, run: Run, steps: int) -> Path:
        """Train a run up to so many steps, from where it stands; the folder of its checkpoint."""
        training = self._training(run, steps)
        folder = self.runs / run.name
        record = RunFolder(folder, self._settings(run, training))
        record.find_checkpoint(print)
        last = record.last_checkpoint
        if last is not None and _step_of(last) > steps:  # its points were lost
            shutil.rmtree(folder)
            return self.train(run, steps)
        if last is not None and _step_of(last) == steps:
            return last
        print(f"training {run.label(steps)}", flush=True)
        args = make_arguments(self.recipe.file, training, folder, None)
        set_seed(args.seed)
        start = build_checkpoint(self.recipe.model, torch.device("cpu"))
        trainer = DMaxTrainer(
            start.model,
            args,
            self.examples.select(range(len(self.examples) - self.held_out)),
            special_ids=start.special_ids,
            processing_class=start.tokenizer,
            callbacks=[record],
        )
        _, kinds = token_kinds(start.tokenizer, start.model.config.vocab_size)
        settings = vars(args) | asdict(start.special_ids) | {"kinds": kinds}
        objective = NOISES[run.noise].objective.from_settings(settings)
        trainer.objective_module = ObjectiveModule(trainer.model, objective)
        record.begin()
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        return folder / f"checkpoint-{steps}"

    def _training(self, run: Run, steps: int) -> dict[str, Any]:
        """The recipe's training with what the study changes."""
        name = "uniform" if run.noise in ("random", "same-kind") else "oput"
        changes = {"learning_rate": run.rate, "seed": run.seed, "objective": name}
        noise = dict(NOISES[run.noise].settings)
        return self.recipe.training | SCHEDULE | changes | noise | {"max_steps": steps}

    def _settings(self, run: Run, training: Mapping[str, Any]) -> dict[str, Any]:
        """All that the weights of a run depend on, whatever the number of its steps."""
        return {
            "noise": run.noise,
            "model": asdict(self.recipe.model),
            "weights": weights_digest(self.base.model),
            "data": data_digest(self.recipe.data),
            "held_out": self.held_out,
            "training": {**training, "max_steps": None},
        }

    def decode(self, run: Run, steps: int, checkpoint: Path) -> None:
        """Accuracy and TPF of a stage at all thresholds."""
        self._sweep(Curve(run.label(steps), str(checkpoint), "spd", THRESHOLDS))

    def _sweep(self, *curves: Curve) -> None:
        run_sweep(
            curves,
            self.task,
            self.points,
            limit=self.limit,
            seed=7,
            open_model=lambda path: LLM(path, max_batch_size=64),
            report=lambda line: print(line, flush=True),
        )

    def measure_base(self) -> None:
        """What the base solves before any step, and its noise at several mask ratios."""
        path = self.recipe.model.path or ""
        self._sweep(
            Curve(BASE, path, "threshold", (CAREFUL,)), Curve(BASE, path, "spd", THRESHOLDS)
        )
        for ratio in RATIOS:
            self.look_at(base_label(ratio), None, ratio)

    def keep_seconds(self, run: Run, checkpoint: Path) -> None:
        """Write down how long a run has trained so far."""
        record = self._looks()
        record["seconds"][run.name] = read_record(checkpoint.parent / RECORD)["seconds"]
        write_atomically(self.looks, json.dumps(record, indent=1) + "\n")

    def _load(self, name: str | Path) -> Checkpoint:
        return load_checkpoint(name, dtype=torch.float32, device=self.device)

    def _looks(self) -> dict[str, Any]:
        here = {"environment": environment(self.device), "looks": {}, "seconds": {}}
        return _read(self.looks) or here

    def look_at(self, label: str, checkpoint: Path | None, ratio: float | None = None) -> None:
        """What the wrong tokens of the noise are like for a model, and what it makes of them."""
        record = self._looks()
        if label in record["looks"]:
            return
        base = self.base
        model = base.model if checkpoint is None else self._load(checkpoint).model
        ids = base.special_ids
        collate = Collator(ids.block_length, ids.eos_token_ids[0], ids.block_length)
        total = len(self.examples)
        held_out = self.examples.select(range(total - self.held_out, total))
        batches = [
            collate(list(held_out.select(range(first, min(first + 32, self.held_out)))))
            for first in range(0, self.held_out, 32)
        ]
        record["looks"][label] = look_at(
            model,
            base.model,
            batches,
            tokenizer=base.tokenizer,
            special_ids=ids,
            ratio=self.recipe.training["mask_ratio_high"] if ratio is None else ratio,
            noises=tuple(NOISES) if checkpoint is None else OF_TRAINED,
        )
        write_atomically(self.looks, json.dumps(record, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    """A record, empty if it is not there yet."""
    return dict(read_record(path)) if path.exists() else {}


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def parse() -> argparse.Namespace:
    """The command line; what it does not say is the design's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", choices=DESIGNS, default=BUNDLED, help="a page and its records")
    parser.add_argument("--recipe", type=Path, help="OPUT on the base, in place of the design's")
    parser.add_argument("--only", nargs="+", choices=NOISES, dest="noises", metavar="NOISE")
    parser.add_argument("--rates", nargs="+", type=amount)
    parser.add_argument("--seeds", nargs="+", type=seed)
    parser.add_argument("--steps", nargs="+", type=count)
    parser.add_argument("--limit", type=count, default=LIMIT, help="problems of a point")
    parser.add_argument("--held-out", type=count, help="examples to look at")
    parser.add_argument("--minutes", type=amount, default=inf, help="begin no stage later")
    parser.add_argument("--runs", type=Path, help="folder of the training runs")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--page", action="store_true", help="measure nothing, write the whole page")
    parser.add_argument("--toy", action="store_true", help="one step, one problem")
    side_by_side.add_options(parser)
    options = parser.parse_args()
    side_by_side.check_options(parser, options)
    check_plots(parser)
    options.design = DESIGNS[options.study]
    if options.toy:
        options.design, options.limit = options.design.at_toy_length(), 1
    for name in ("noises", "rates", "steps"):
        check_planned(parser, options.design, name, getattr(options, name) or ())
    given = vars(options)
    for name in ("recipe", "noises", "rates", "seeds", "steps", "held_out"):
        if given[name] is None:
            given[name] = getattr(options.design, name)
    options.runs = options.runs or Path("runs", options.study)
    return options


def check_planned(
    parser: argparse.ArgumentParser, design: Design, name: str, chosen: Sequence[Any]
) -> None:
    """End the script if the design does not have all that was chosen of its noises or numbers."""
    planned = getattr(design, name)
    unplanned = [value for value in chosen if value not in planned]
    if unplanned:
        others = ", ".join(map(str, unplanned))
        parser.error(f"the study has the {name} {', '.join(map(str, planned))}, got {others}")


def study_of(options: argparse.Namespace, output: Path) -> Study:
    """The study that the command line asks for, with its records in a folder."""
    recipe = options.design.read(options.recipe)
    changes: dict[str, Any] = {"use_cpu": not options.gpu}
    if options.toy:
        changes["per_device_train_batch_size"] = 2
    return Study(
        replace(recipe, training=recipe.training | changes),
        options.runs,
        output,
        options.study,
        task=options.design.task,
        held_out=options.held_out,
        num_examples=options.design.num_examples,
        limit=options.limit,
        device="cuda" if options.gpu else "cpu",
    )


def do_part(
    stages: Sequence[Stage], options: argparse.Namespace, end: float
) -> list[side_by_side.Pair]:
    """The stages of one run that begin before `end`, with records beside its checkpoints."""
    run, _ = stages[0]
    whole = study_of(options, options.output)
    part = study_of(options, options.runs / f"{run.name}-records")
    pairs = [(part.points, whole.points), (part.looks, whole.looks)]
    for pair in pairs:
        side_by_side.begin(*pair)
    part.run(stages, minutes=(end - time.time()) / 60)
    return pairs


def measure(study: Study, stages: Sequence[Stage], options: argparse.Namespace) -> None:
    """Train and measure the stages that are missing, one run after the other or side by side.

    Raises:
        InputError: the base, or the data that it is trained on, is not there.
    """
    make_ready(study.recipe, options)
    if options.jobs == 1:
        study.run(stages, minutes=options.minutes)
        return
    study.measure_base()
    runs = dict.fromkeys(run for run, _ in stages)
    by_run = [[stage for stage in stages if stage[0] == run] for run in runs]
    end = time.time() + 60 * options.minutes
    work = [(do_part, (own, options, end)) for own in by_run]
    side_by_side.do(work, options.jobs)


def make_ready(recipe: Recipe, options: argparse.Namespace) -> None:
    """Make the answers of the bundled base; `InputError` if another base or its data is missing."""
    data = Path(recipe.data.file or "")
    if options.recipe == DESIGNS[BUNDLED].recipe and not data.is_file():
        make_responses(data)
    for needed in (recipe.model.path or "", str(data)):
        if needed.startswith("runs/") and not Path(needed).exists():
            hint = f"run `{options.design.before}` first"
            raise InputError(f"{needed} is not there yet", hint=hint)


@telling()
def main() -> None:
    """Measure what is missing, write the page."""
    options = parse()
    study = study_of(options, options.output)
    if not options.page:
        stages = list(plan(options.noises, options.rates, options.seeds, options.steps))
        measure(study, stages, options)
    if study.points.exists():
        write_page(study.points, study.looks, options.design)


if __name__ == "__main__":
    main()
