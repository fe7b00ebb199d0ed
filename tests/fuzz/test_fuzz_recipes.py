"""Recipes: every one that comes with dmax, changed; as bytes, as keys and as values."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hostile
import pytest
import yaml
from hypothesis import strategies as st
from mutations import STAND_INS, Mutation, byte_mutations, in_place_of, put, replace, tree_mutations
from oracle import attempt, draw, fuzz, refused
from safetensors.torch import load_file

import dmax.recipe.head
import dmax.recipe.run
from dmax.errors import InputError
from dmax.recipe.run import run_recipe
from dmax.recipe.sections import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "output_dir": "out",
    "model": {
        "attn_implementation": "eager",
        "config": {
            "block_length": 8,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "intermediate_size": 16,
            "moe_intermediate_size": 8,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
            "max_position_embeddings": 512,
        },
    },
    "data": {"problems": 4, "seed": 3},
    "training": {
        "objective": "mdlm",
        "mask_ratio_low": 0.3,
        "mask_ratio_high": 1.0,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "warmup_steps": 0,
        "router_bias_speed": 0.001,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 1,
        "report_to": "none",
        "disable_tqdm": True,
    },
}
BOMB = "".join(
    f"a{depth}: &a{depth} [{f'*a{depth - 1}, ' * 9}0]\n" for depth in range(1, 9)
).replace("*a0, ", "")
MAPPINGS = "a0: &a0 {a: 1}\n" + "".join(
    f"a{depth}: &a{depth} {{{', '.join(f'k{each}: *a{depth - 1}' for each in range(9))}}}\n"
    for depth in range(1, 12)
)
WHOLES = (
    BOMB.encode(),
    MAPPINGS.encode(),
    b"output_dir: !!python/object/apply:os.system [touch out]\n",
    b"output_dir: !!binary aGk=\nmodel: !!set {a}\ndata: !!omap []\ntraining: {}\n",
    b"a: &a [*a]\n",
    b"? {a: 1}\n: 2\n",
    b"<<: {output_dir: out}\n",
    b"output_dir: out\n\toutput_dir: out\n",
    b"output_dir: 2026-99-99\n",
    b"--- 1\n--- 2\n",
    b"%YAML 9.9\n---\n{}\n",
    b"a: " + b"[" * 3_000 + b"]" * 3_000,
    b"a: " + b"{a: " * 3_000 + b"}" * 3_000,
    b"a: " + b"9" * 5_000,
    b"a: 0x" + b"f" * 10_000,
    b"- " * 3_000,
)


class Reached(BaseException):
    """A model would be loaded now."""


@pytest.fixture
def no_models() -> Iterator[None]:
    """A recipe that would be trained raises `Reached`, so all checks are done by then."""

    def reach(*_: Any, **__: Any) -> None:
        raise Reached

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmax.recipe.run, "build_checkpoint", reach)
        patch.setattr(dmax.recipe.head, "build_checkpoint", reach)
        yield


def check(content: bytes) -> str | InputError:
    """Run a recipe up to the loading of its model; what the recipe says, or the refusal."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        patch.chdir(folder)
        (folder / "recipe.yaml").write_bytes(content)
        # The data of the recipes that come with dmax, one record in place of thousands.
        (folder / "runs").mkdir()
        for data in ("tiny_responses", "tiny_sequential_responses"):
            record = '{"index": 0, "prompt": "a", "response": "b"}\n'
            (folder / "runs" / f"{data}.jsonl").write_text(record)

        def run() -> str:
            recipe = load_recipe("recipe.yaml")
            with suppress(Reached):
                run_recipe(recipe)
            return repr(recipe)

        return attempt(run, folder)


@fuzz(80, file=st.sampled_from(RECIPES), data=st.data())
def test_bytes_of_a_recipe(no_models: None, file: Path, data: st.DataObject) -> None:
    whole = st.sampled_from(WHOLES).map(replace)
    content = small(file)
    for mutation in draw(data, st.lists(byte_mutations() | whole, min_size=1, max_size=2)):
        content = mutation.apply(content)
    check_finite(check(content))


@fuzz(130, file=st.sampled_from(RECIPES), data=st.data())
def test_keys_and_values_of_a_recipe(no_models: None, file: Path, data: st.DataObject) -> None:
    tree = yaml.safe_load(small(file))
    mutations = draw(data, st.lists(tree_mutations(tree), min_size=1, max_size=2))
    for mutation in mutations:
        tree = mutation.apply(tree)
    check_finite(check(written(tree)))


def small(file: Path) -> bytes:
    """A recipe with few problems, for they are drawn before a model is loaded."""
    return re.sub(rb"problems: \d+", b"problems: 8", file.read_bytes())


def written(tree: Any) -> bytes:
    return yaml.safe_dump(tree, allow_unicode=False).encode("utf-8", "surrogatepass")


def check_finite(outcome: str | InputError) -> None:
    """No number of a recipe that is accepted is infinite or no number."""
    if not isinstance(outcome, InputError):
        words = outcome.replace("=", " ").replace(",", " ").replace(":", " ").split()
        assert not {"nan", "inf", "-inf"} & set(words), outcome[:300]


WHOLE_BUT_WRONG = (math.nan, math.inf, -math.inf, "1", "many", None, [], [1], {}, -5, 10**400)
REAL_BUT_WRONG = (math.nan, math.inf, -math.inf, "1e-3", "much", [], [0.5], {}, True, -0.5, 10**400)
WRONG: dict[tuple[str, ...], tuple[Any, ...]] = {
    ("training", "learning_rate"): REAL_BUT_WRONG,
    ("training", "gradient_accumulation_steps"): (0, -1, *WHOLE_BUT_WRONG),
    ("training", "per_device_train_batch_size"): (0, -1, *WHOLE_BUT_WRONG),
    ("training", "max_steps"): WHOLE_BUT_WRONG,
    ("training", "weight_decay"): REAL_BUT_WRONG,
    ("training", "adam_beta1"): (1.5, *REAL_BUT_WRONG),
    ("training", "adam_beta2"): (1.5, *REAL_BUT_WRONG),
    ("training", "adam_epsilon"): REAL_BUT_WRONG,
    ("training", "max_grad_norm"): REAL_BUT_WRONG,
    ("training", "mask_ratio_low"): (1.5, *REAL_BUT_WRONG),
    ("training", "mask_ratio_high"): (1.5, *REAL_BUT_WRONG),
    ("training", "router_bias_speed"): REAL_BUT_WRONG,
    ("training", "warmup_steps"): (-3, math.nan, math.inf, "1", [], {}),
    ("training", "num_train_epochs"): (math.nan, math.inf, -1, "1", [], {}),
    ("training", "objective"): (None, 1, "", "opuut", [], {}, True),
    ("training", "optim"): ("adamm", 1, [], {}),
    ("training", "lr_scheduler_type"): ("cosinus", 1, [], {}),
    ("training", "seed"): (-1, 2**70, 0.5, "1", [], math.nan),
    ("data", "problems"): (0, 10**9, *WHOLE_BUT_WRONG),
    ("data", "seed"): (0.5, "1", [], {}, math.nan),
    ("data", "max_length"): (0, -1, 0.5, "1", [], {}, math.nan),
    ("model", "dtype"): ("float16", "auto", "int8", "", None, 1, [], {}, True),
    ("model", "keep_start"): (0.5, *REAL_BUT_WRONG),
    ("model", "attn_implementation"): ("flsh", 1, [], {}, "kernels-community/flash-attn"),
    ("model", "experts_implementation"): ("fast", 1, [], {}),
    ("model", "config", "num_hidden_layers"): (0, 10**6, *WHOLE_BUT_WRONG),
    ("model", "config", "hidden_size"): (0, 10**9, *WHOLE_BUT_WRONG),
    ("model", "config", "num_experts"): (10**9, *WHOLE_BUT_WRONG),
    ("model", "config", "block_length"): (0, -1, 10**9, 0.5, "8", [8], {}, math.nan),
    ("model", "config", "max_position_embeddings"): (0, *WHOLE_BUT_WRONG),
    ("model", "config", "vocab_size"): (0, 1, 10**12, *WHOLE_BUT_WRONG),
    ("output_dir",): ("", ".", "..", "/", "/dev/null/a", None, 1, [], {}, math.nan),
}
wrong = st.sampled_from([(place, value) for place, values in WRONG.items() for value in values])


@fuzz(110, wrong=wrong, seed=st.integers(0, 99))
def test_a_wrong_value_of_a_recipe_is_refused(
    no_models: None, wrong: tuple[tuple[str, ...], Any], seed: int
) -> None:
    place, value = wrong
    tree = {**SMALL, "data": {"problems": 4, "seed": seed}}
    parent: Any = tree
    for key in place[:-1]:
        parent = parent[key]
    tree = put(place, value).apply(tree) if place[-1] in parent else added(tree, place, value)
    refused(check(written(tree)), f"`{'.'.join(place)}` is {value!r:.40}")


def added(tree: Any, place: tuple[str, ...], value: Any) -> Any:
    return put(place, value).apply(
        put(place[:-1], {**tree[place[0]], place[-1]: value}).apply(tree)
    )


@fuzz(12, what=st.sampled_from(sorted(STAND_INS)), seed=st.integers(0, 99))
def test_something_else_in_the_place_of_a_recipe(
    no_models: None, tmp_path_factory: pytest.TempPathFactory, what: str, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("recipe")
    in_place_of(folder / f"{seed}.yaml", what)
    refused(attempt(lambda: load_recipe(folder / f"{seed}.yaml"), folder), f"it is {what}")


SPARED = ("max_steps", "report_to", "use_cpu", "save_strategy", "disable_tqdm")
numbers = st.one_of(
    st.floats(0, 2), st.integers(0, 4), st.sampled_from(hostile.REAL), st.sampled_from((1e-3, 1e30))
)


@fuzz(
    8,
    changes=st.dictionaries(
        st.sampled_from([name for name in SMALL["training"] if name not in SPARED]),
        numbers,
        min_size=1,
        max_size=2,
    ),
)
def test_a_recipe_that_is_accepted_trains_finite_weights(changes: dict[str, Any]) -> None:
    tree = {**SMALL, "training": SMALL["training"] | changes}
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        patch.chdir(folder)
        (folder / "recipe.yaml").write_bytes(written(tree))
        outcome = attempt(lambda: run_recipe(load_recipe("recipe.yaml")))
        if isinstance(outcome, InputError):
            assert not (folder / "out").exists(), "a model was saved, although the run failed"
            return
        weights = load_file(folder / "out" / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values())


def test_the_small_recipe_is_valid(no_models: None) -> None:
    assert not isinstance(check(written(SMALL)), InputError)
    assert Mutation("none", lambda tree: tree).apply(SMALL) is SMALL
