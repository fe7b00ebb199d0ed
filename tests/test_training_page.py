"""docs/training.md: its walk on a CPU works, its recipes load, and what it names exists."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from test_cli import Dmax, dmax_fixture  # noqa: F401  (a fixture)
from test_docs import blocks
from typer.main import get_command

from dmax.cli import app
from dmax.recipe import sections
from dmax.records.readers import READERS
from dmax.training import objective_table

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
WALK = "## On a CPU, in minutes"
# What the walk takes in minutes, in seconds.
SMALLER = {
    "problems(1200, seed=3)": "problems(6, seed=3)",
    "dmax train recipes/tiny_walk.yaml": "dmax train recipes/tiny_walk.yaml --max-steps 2",
    "--limit 200": "--limit 2",
    "--limit 100": "--limit 2 --thresholds 0.5",
}


def section(title: str) -> str:
    """What stands below a title, up to the next one of its kind."""
    return PAGE.partition(f"{title}\n")[2].partition("\n## ")[0]


def commands(text: str) -> Iterator[str]:
    """Every command of the `sh` blocks, each with all of its lines."""
    for _, language, content, _ in blocks(text):
        if language == "sh":
            lines = content.replace("\\\n", "")
            yield from re.findall(r'(?:"[^"]*"|[^"\n])+', lines)


@pytest.mark.slow
def test_the_walk_on_a_cpu_leads_to_a_model_that_decodes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dmax: Dmax,
) -> None:
    for extra in ("accelerate", "datasets", "matplotlib"):
        pytest.importorskip(extra)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    done: list[str] = []
    for command in commands(section(WALK)):
        smaller = command
        for long, short in SMALLER.items():
            smaller = smaller.replace(long, short)
        if command.startswith("dmax "):
            result = dmax(*shlex.split(smaller, comments=True)[1:])
            assert result.code == 0, f"{smaller}\n{result.err}"
        elif not command.startswith("pip "):
            python = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}\n'
            subprocess.run(["bash", "-ec", python + smaller], check=True, env=os.environ)
        done.append(command.split()[1])
    assert done == ["install", "-p", "-c", *"distill train eval eval sweep generate".split()]
    assert {"model.safetensors", "curves.png"} <= {
        file.name for file in Path("runs/walk").iterdir()
    }
    assert (tmp_path / "runs" / "walk-sweep" / "report.html").is_file()


def test_every_recipe_that_is_named_exists() -> None:
    named = set(re.findall(r"recipes/[\w.]+\.yaml", PAGE))
    assert named and not [name for name in named if not (ROOT / name).is_file()]
    launched = re.findall(r"^torchrun --nproc_per_node \d -m dmax train (\S+)", PAGE, re.MULTILINE)
    assert len(launched) == PAGE.count("\ntorchrun ") > 0
    assert set(launched) <= named | {"recipe.yaml"}


def test_recipes_and_sections_on_the_page_are_valid(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    found = [content for _, language, content, _ in blocks(PAGE) if language == "yaml"]
    whole = {"output_dir": "runs/out", "model": {"path": "tiny-base"}, "data": {"problems": 8}}
    for content in found:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(whole | {"training": {}} | yaml.safe_load(content)))
        sections.load_recipe(path)
    assert found


@pytest.mark.slow
def test_the_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for extra in ("accelerate", "datasets", "peft"):
        pytest.importorskip(extra)
    monkeypatch.chdir(tmp_path)
    found = [content for _, language, content, _ in blocks(PAGE) if language == "python"]
    for content in found:
        exec(compile(content, "training.md", "exec"), {})
    assert len(found) == 1
    assert (tmp_path / "runs" / "python" / "adapter_model.safetensors").is_file()


def test_options_and_keys_that_are_named_exist() -> None:
    known = get_command(app).commands  # type: ignore[attr-defined]
    flags = {flag for each in known.values() for option in each.params for flag in option.opts}
    of_others = {"--nproc", "--logdir", "--cpu", "--records"}  # of other programs
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE)) <= flags | of_others
    kinds = [each for each in vars(sections).values() if dataclasses.is_dataclass(each)]
    keys = {entry.name for kind in kinds for entry in dataclasses.fields(kind)}
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)(?::[^`]*)?`", PAGE))
    # Of libraries, of `DMaxTrainer`, and what `targets` may name.
    others = {"fully_shard", "ep_size", "shared_experts", "peft_config", "train_dataset"}
    others |= {"eval_dataset", "eval_hook", "eval_loss", "compute_metrics", "data_collator"}
    others |= {"formatting_func", "flex_attention"}
    logged = {"mmd_masked", "mmd_predicted", "median_bandwidth"}
    assert named - keys - READERS.keys() - objective_table().keys() - others - logged == set()
