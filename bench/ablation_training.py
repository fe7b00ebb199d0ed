"""Train the models of the ablation: `recipes/tiny_ablation.yaml`, its variants, three seeds each.

    python bench/ablation_training.py

Models that are there already are not trained again, so an interrupted run goes on where it stopped.
The base model's responses are made first, or gone on with.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from command_line import num_answered, telling

from dmax.distill.files import ResponseFiles
from dmax.distill.model import ModelAnswerer
from dmax.distill.run import distill
from dmax.llm import LLM
from dmax.params import DecodingParams
from dmax.recipe.run import run_recipe
from dmax.recipe.sections import Recipe, load_recipe
from dmax.tasks.word_problems import problems

RECIPE = Path("recipes/tiny_ablation.yaml")
ROOT = Path("runs/ablation")
SEEDS = (1, 2, 3)
NUM_RESPONSES = 5000
VARIANTS: dict[str, dict[str, Any]] = {  # what differs from the recipe; None: left out
    "masks only": {"objective": "mdlm", "rollout": None},
    "random tokens": {"objective": "uniform", "rollout": None},
    "argmax rollouts": {"rollout": "argmax"},
    "sampled rollouts": {},
    "mask ratio 0.5": {"mask_ratio_low": 0.5, "mask_ratio_high": 0.5},
    "mask ratio 1": {"mask_ratio_low": 1.0, "mask_ratio_high": 1.0},
}


def folder(variant: str, seed: int) -> Path:
    """Where a variant's checkpoint lies."""
    return ROOT / f"{variant.replace(' ', '-')}-{seed}"


def recipes() -> Iterator[Recipe]:
    """One recipe a variant and seed; seed by seed, so that comparisons are complete early."""
    read = load_recipe(RECIPE)
    for seed in SEEDS:
        for variant, changes in VARIANTS.items():
            training = read.training | changes | {"seed": seed}
            given = {name: value for name, value in training.items() if value is not None}
            yield replace(read, training=given, output_dir=folder(variant, seed))


def make_responses(output: Path) -> None:
    """Make the base model's own answers to training problems; the recipes name the command.

    What is there is kept: a file that was cut off is gone on with.
    """
    if num_answered(output) >= NUM_RESPONSES:
        return
    questions = [problem.question for problem in problems(NUM_RESPONSES, seed=1)]
    llm = LLM("tiny-base", max_batch_size=128)
    answerer = ModelAnswerer(llm, DecodingParams(strategy="threshold", threshold=0.95))
    print(distill(answerer, questions, ResponseFiles(output)))


@telling()
def main() -> None:
    """Train what is missing."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    make_responses(Path(load_recipe(RECIPE).data.file or ""))
    for recipe in recipes():
        if not (recipe.output_dir / "config.json").is_file():
            print(recipe.output_dir, flush=True)
            run_recipe(recipe, report=print)


if __name__ == "__main__":
    main()
