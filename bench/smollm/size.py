"""How much of the original is kept and how long its stages train: on two cores, and on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dmax.recipe.sections import Recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
RUNS = Path("runs")
OF_RECIPES = "pretrained"  # how the recipes name what they read and write

Changes = Mapping[str, Any]
CAUSAL: dict[str, Any] = {  # how the autoregressive original learns the task
    "max_steps": 240,
    "per_device_train_batch_size": 8,
    "learning_rate": 4e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    "weight_decay": 0.01,
    "adam_beta2": 0.98,
    "max_grad_norm": 1.0,
    "include_num_input_tokens_seen": True,
    "logging_steps": 5,
    "eval_strategy": "steps",
    "eval_steps": 80,
    "per_device_eval_batch_size": 32,
    "save_steps": 80,
    "save_total_limit": 1,
    "seed": 1,
    "report_to": "none",
    "disable_tqdm": True,
}


@dataclass(frozen=True, slots=True)
class Size:
    """What every stage takes from the original, reads and computes.

    Attributes:
        name: of the record, the page and all folders.
        command: that makes all stages.
        use_cpu: whether stages train on the CPU, whatever else is there.
        cuts_vocabulary: whether only the tokens of the task are kept, with a token for each number.
        block_length: of the base model and of all that comes from it.
        num_problems: that are drawn for training.
        num_responses: of the base model's own answers.
        limit: problems of a point.
        batch_size: of decoding.
        causal: fields of `CAUSAL` that are others.
        training: the same for the recipes, by stage.
        num_held_out: problems of held-out losses.
        enough: share of the task that the base has to solve before anything is built on it.
    """

    name: str
    command: str
    use_cpu: bool
    cuts_vocabulary: bool
    block_length: int
    num_problems: int
    num_responses: int
    limit: int
    batch_size: int
    causal: Changes = field(default_factory=dict, hash=False)
    training: Mapping[str, Changes] = field(default_factory=dict, hash=False)
    num_held_out: int = 64
    enough: float = 0.5

    @property
    def problems(self) -> Path:
        """The file of training problems."""
        return RUNS / f"{self.name}_problems.jsonl"

    @property
    def held_out(self) -> Path:
        """The file of problems whose losses are logged."""
        return RUNS / f"{self.name}_held_out.jsonl"

    @property
    def responses(self) -> Path:
        """The file of the base model's answers."""
        return RUNS / f"{self.name}_responses.jsonl"

    @property
    def held_out_responses(self) -> Path:
        """The file of the base model's answers to the problems whose losses are logged."""
        return RUNS / f"{self.name}_held_out_responses.jsonl"

    @property
    def evaluations(self) -> Path:
        """The folder of what was decoded."""
        return self.folder("eval")

    @property
    def attention(self) -> str:
        """How models attend in training: fastest at these lengths, with nothing to compile."""
        return "eager" if self.use_cpu else "sdpa"

    def folder(self, stage: str) -> Path:
        """Where the model of a stage lies."""
        return RUNS / f"{self.name}-{stage}"

    def recipe(self, stage: str) -> Recipe:
        """`recipes/pretrained_<stage>.yaml` at this size."""
        changes = {"use_cpu": self.use_cpu, **self.training.get(stage, {})}
        recipe = load_recipe(RECIPES / f"{OF_RECIPES}_{stage}.yaml", changes)
        return replace(self.fitted(recipe), output_dir=self.folder(stage))

    def fitted(self, recipe: Recipe) -> Recipe:
        """A recipe with the base and the data of this size."""
        model = replace(
            recipe.model,
            path=self._own(recipe.model.path),
            attn_implementation=self.attention,
        )
        if model.block_length is not None:
            model = replace(model, block_length=self.block_length)
        data = replace(
            recipe.data,
            file=self._own(recipe.data.file),
            eval_file=self._own(recipe.data.eval_file),
        )
        return replace(recipe, model=model, data=data)

    def _own(self, path: str | None) -> str | None:
        """A path of the recipes as this size has it."""
        named = f"{RUNS}/{OF_RECIPES}"
        return path and path.replace(named, f"{RUNS}/{self.name}", 1)


CPU = Size(
    name="pretrained",
    command="python bench/pretrained.py",
    use_cpu=True,
    cuts_vocabulary=True,
    block_length=16,
    num_problems=20_000,
    num_responses=640,
    limit=200,
    batch_size=32,
)
_TWO_EPOCHS = {
    "max_steps": 256,  # of the responses, as in the paper
    "warmup_steps": 20,
    "per_device_train_batch_size": 32,
    "logging_steps": 16,
    "eval_steps": 64,
    "save_steps": 128,
}
GPU = Size(
    name="pretrained_gpu",
    command="python bench/pretrained.py --gpu",
    use_cpu=False,
    cuts_vocabulary=False,
    block_length=32,
    num_problems=32_000,
    num_responses=4_096,
    limit=500,
    batch_size=64,
    causal={
        "max_steps": 300,
        "per_device_train_batch_size": 32,
        "eval_steps": 100,
        "save_steps": 300,
    },
    training={
        "base": {
            "max_steps": 1000,  # two epochs of the problems
            "per_device_train_batch_size": 64,
            "warmup_steps": 50,
            "logging_steps": 25,
            "eval_steps": 250,
            "save_steps": 500,
        },
        "oput": _TWO_EPOCHS,
        "masks": _TWO_EPOCHS,
        "random": _TWO_EPOCHS,
    },
)
