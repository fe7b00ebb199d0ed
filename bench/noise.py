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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

import side_by_side
import torch
from ablation_training import make_responses
from command_line import check_page, read_if_there, telling
from noise_kinds import NOISES, OF_TRAINED, look_at, token_kinds
from noise_options import parse
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
    Run,
    Stage,
    base_label,
    plan,
)
from sweeps import sweep
from transformers import set_seed

from dmax.checkpoint import Checkpoint, load_checkpoint
from dmax.environment import DTYPES, environment, weights_digest
from dmax.errors import InputError
from dmax.evaluation.sweep import Curve
from dmax.files import changes, check_ours, read_record, write_atomically
from dmax.recipe.arguments import make_arguments
from dmax.recipe.build import build_checkpoint, data_digest, encode_data, read_data
from dmax.recipe.folder import RECORD, RunFolder
from dmax.recipe.sections import Recipe
from dmax.training.data import Collator
from dmax.training.objectives import ObjectiveModule
from dmax.training.trainer import DMaxTrainer

OF_A_RUN = ("learning_rate", "seed", "objective", "max_steps", "use_cpu")


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
        self.task = task
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
        if self.num_examples is not None:
            examples = examples.select(range(min(self.num_examples, len(examples))))
        if self.held_out >= len(examples):
            raise InputError(
                f"of {len(examples)} examples, {self.held_out} held out leave none to learn from",
                hint="hold out fewer with --held-out, or add data",
            )
        return examples

    def run(self, stages: Sequence[Stage], *, minutes: float = inf) -> None:
        """Train and measure what is missing, until the time is over; a begun stage is finished.

        Raises:
            InputError: the record is of another study (`check`), or too little data is there.
        """
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

    def check(self) -> None:
        """Make sure that what is measured already began where this study begins.

        Raises:
            InputError: it has another base, other data or other settings.
        """
        if others := sorted(set(self._differences())):
            raise InputError(
                f"{self.points} holds a study that differs in {', '.join(others)}",
                hint="choose another --output, or remove the record",
            )

    def _differences(self) -> Iterator[str]:
        """What the records were made with that is another thing now."""
        record = read_if_there(self.points)
        asked = {"limit": self.limit, "task": self.task}
        yield from (name for name, value in asked.items() if record.get(name, value) != value)
        base = [point for point in record.get("points", []) if point["label"] == BASE]
        # The dtype of decoding is the machine's, and the digest is another one in each.
        for dtype, weights in {(point["dtype"], point["weights"]) for point in base}:
            if weights != weights_digest(self._base_in(dtype).model):
                yield "the weights of the base"
        if settings := read_if_there(self.looks).get("settings"):  # older records have none
            now = json.loads(json.dumps(self._shared_settings(), default=str))
            yield from (f"`{name}`" for name, _, _ in changes(settings, now))

    def is_measured(self, run: Run, steps: int) -> bool:
        """Whether all points of a stage are in the record."""
        points = read_if_there(self.points).get("points", [])
        held = {point["value"] for point in points if point["label"] == run.label(steps)}
        return held >= set(THRESHOLDS)

    def train(self, run: Run, steps: int) -> Path:
        """Train a run up to so many steps, from where it stands; the folder of its checkpoint."""
        training = self._training(run, steps)
        folder = self.runs / run.name
        record = RunFolder(folder, self._settings(run, training))
        record.find_checkpoint(print)
        last = record.last_checkpoint
        if last is not None and _step_of(last) > steps:
            # The points of this stage were lost, or a later one was asked for first.
            print(f"{last} is past {steps} steps: training {run.name} anew", flush=True)
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
        own = {"learning_rate": run.rate, "seed": run.seed, "objective": name, "max_steps": steps}
        return self.recipe.training | SCHEDULE | own | dict(NOISES[run.noise].settings)

    def _settings(self, run: Run, training: Mapping[str, Any]) -> dict[str, Any]:
        """All that the weights of a run depend on, whatever the number of its steps."""
        return {
            "noise": run.noise,
            "model": asdict(self.recipe.model),
            **self._source(),
            "training": {**training, "max_steps": None},
        }

    def _source(self) -> dict[str, Any]:
        """The base, and what of the data is learnt."""
        source = {
            "weights": weights_digest(self.base.model),
            "data": data_digest(self.recipe.data),
            "held_out": self.held_out,
        }
        # Runs that began before this was written down have no such entry.
        return source | ({"num_examples": self.num_examples} if self.num_examples else {})

    def _shared_settings(self) -> dict[str, Any]:
        """What all runs of a record have in common, wherever they are trained."""
        training = self.recipe.training | SCHEDULE
        shared = {name: value for name, value in training.items() if name not in OF_A_RUN}
        return self._source() | {"training": shared}

    def decode(self, run: Run, steps: int, checkpoint: Path) -> None:
        """Accuracy and TPF of a stage at all thresholds."""
        self._sweep(Curve(run.label(steps), str(checkpoint), "spd", THRESHOLDS))

    def _sweep(self, *curves: Curve) -> None:
        sweep(curves, self.points, self.limit, task=self.task)

    def measure_base(self) -> None:
        """What the base solves before any step, and its noise at several mask ratios.

        Raises:
            InputError: as `run` does, before anything is changed.
        """
        self.check()
        for ratio in RATIOS:
            self.look_at(base_label(ratio), None, ratio)
        path = self.recipe.model.path or ""
        curves = Curve(BASE, path, "threshold", (CAREFUL,)), Curve(BASE, path, "spd", THRESHOLDS)
        held = {
            (point["strategy"], point["value"])
            for point in read_if_there(self.points).get("points", [])
            if point["label"] == BASE
        }
        # Points of the same base on a machine of another dtype stay as they are.
        if not held >= {(curve.strategy, value) for curve in curves for value in curve.values}:
            self._sweep(*curves)

    def keep_seconds(self, run: Run, checkpoint: Path) -> None:
        """Write down how long a run has trained so far."""
        record = self._looks()
        record["seconds"][run.name] = read_record(checkpoint.parent / RECORD)["seconds"]
        write_atomically(self.looks, json.dumps(record, indent=1) + "\n")

    def _load(self, name: str | Path) -> Checkpoint:
        return load_checkpoint(name, dtype=torch.float32, device=self.device)

    def _base_in(self, dtype: str) -> Checkpoint:
        if dtype == "float32":
            return self.base
        return load_checkpoint(self.recipe.model.path or "", dtype=DTYPES[dtype], device="cpu")

    def _looks(self) -> dict[str, Any]:
        if record := read_if_there(self.looks):
            return record
        begun = {"environment": environment(self.device), "settings": self._shared_settings()}
        return begun | {"looks": {}, "seconds": {}}

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


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def study_of(options: argparse.Namespace, output: Path) -> Study:
    """The study that the command line asks for, with its records in a folder."""
    recipe = options.design.read(options.recipe)
    training = recipe.training | {"use_cpu": not options.gpu}
    if options.toy:
        training["per_device_train_batch_size"] = 2
    return Study(
        replace(recipe, training=training),
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
    part.check()  # what it alone knows is kept
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
    work = {own[0][0].name: (do_part, (own, options, end)) for own in by_run}
    side_by_side.do(work, options.jobs)


def make_ready(recipe: Recipe, options: argparse.Namespace) -> None:
    """Make the answers of the bundled base; `InputError` if another base or its data is missing."""
    data = Path(recipe.data.file or "")
    if options.recipe == DESIGNS[BUNDLED].recipe:
        make_responses(data)
    for needed in (recipe.model.path or "", str(data)):
        if needed.startswith("runs/") and not Path(needed).exists():
            hint = f"run `{options.design.before}` first"
            raise InputError(f"{needed} is not there yet", hint=hint)


@telling()
def main() -> None:
    """Measure what is missing, write the page."""
    options = parse(__doc__.splitlines()[0])
    study = study_of(options, options.output)
    check_ours(study.points, "points")
    check_ours(study.looks, "looks", "seconds")
    check_page(study.points.with_suffix(".md"), f"# {options.design.title}")
    if not options.page:
        stages = list(plan(options.noises, options.rates, options.seeds, options.steps))
        measure(study, stages, options)
    elif not study.points.exists():
        raise InputError(f"{study.points} is not there yet", hint=f"run `{options.design.command}`")
    write_page(study.points, study.looks, options.design)


if __name__ == "__main__":
    main()
