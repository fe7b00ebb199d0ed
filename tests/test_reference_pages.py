"""docs/recipe.md and docs/python.md leave nothing out: their tables are compared with the code."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from test_docs import blocks, needs_models

import dmax
from dmax.baselines.head_training import HeadConfig
from dmax.errors import InputError
from dmax.llm import LLM
from dmax.outputs import Cost, FinishReason, GenerationOutput, StreamEvent
from dmax.params import MOST, DecodingParams, EngineOptions
from dmax.recipe import sections
from dmax.recipe.arguments import IN_DATA, OUT_OF_PLACE, argument_names
from dmax.recipe.lora import LoraSection
from dmax.recipe.run import run_recipe
from dmax.recipe.sections import DataSection, EvalSection, ModelSection, load_recipe
from dmax.tasks.word_problems import Numbers
from dmax.training import get_objective, objective_table
from dmax.training.config import DMaxConfig
from dmax.training.objectives import Objective
from dmax.training.sharding import Sharding

DOCS = Path(__file__).parents[1] / "docs"
RECIPE = (DOCS / "recipe.md").read_text(encoding="utf-8")
PYTHON = (DOCS / "python.md").read_text(encoding="utf-8")
NONE = "–"  # in place of a default
REQUIRED = "required"  # in place of a default that is refused
Row = dict[str, str]

SECTIONS: dict[str, type] = {
    "model": ModelSection,
    "data": DataSection,
    "fsdp": Sharding,
    "lora": LoraSection,
    "head": HeadConfig,
    "eval": EvalSection,
}
# Fields of the training arguments that a recipe may have, ours and those with a default of ours.
TRAINING = {
    entry.name: entry
    for entry in fields(DMaxConfig)
    if entry.name in vars(DMaxConfig)["__annotations__"]
    and entry.name in argument_names() - OUT_OF_PLACE - IN_DATA.keys()
}


def section(page: str, title: str) -> str:
    """What stands below a title, up to the next one of its kind."""
    assert page.count(f"\n## {title}\n") == 1, f"there must be one section {title}"
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def tables(text: str) -> Iterator[list[Row]]:
    """The rows of every table, by the titles of their columns."""
    for found in re.findall(r"(?:^\|.*\|\n)+", text + "\n", flags=re.MULTILINE):
        titles, _, *rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines()
        ]
        yield [dict(zip(titles, row, strict=True)) for row in rows]


def rows(text: str, first: str) -> dict[str, Row]:
    """The rows of all tables whose first column has this title, by the names in it."""
    found: dict[str, Row] = {}
    for row in (row for table in tables(text) for row in table if next(iter(row)) == first):
        names = re.findall(r"`(\w+)`", row[first])
        assert names and not found.keys() & set(names), f"a row without a name of its own: {row}"
        found |= dict.fromkeys(names, row)
    return found


def shown(cell: str, read: Callable[[str], Any]) -> str:
    """A default of a table as Python writes it, or what stands in its place."""
    if code := re.fullmatch(r"`(.+)`", cell):
        return repr(read(code[1]))
    return cell if cell in (NONE, REQUIRED) else f"no code: {cell}"


def defaults(kind: type) -> dict[str, str]:
    """The default of every field of a dataclass as Python writes it; `NONE` without one."""
    return {entry.name: default(entry) for entry in fields(kind)}


def default(entry: Field[Any]) -> str:
    if entry.default_factory is not MISSING:
        return repr(entry.default_factory())
    return NONE if entry.default is MISSING else repr(entry.default)


def documented(text: str, first: str, read: Callable[[str], Any]) -> dict[str, str]:
    """The default of every name in the tables of a section; their rows say what they mean."""
    found = rows(text, first)
    assert all(len(row["meaning"]) > 5 for row in found.values())
    return {name: shown(row["default"], read) for name, row in found.items()}


def properties(kind: type) -> set[str]:
    return {name for name, value in vars(kind).items() if isinstance(value, property)}


def bounds(entry: Field[Any]) -> str:
    """The range of a number as the pages write it; empty for a field without bounds."""
    if not entry.metadata:
        return ""
    low, high = entry.metadata["low"], entry.metadata.get("high", MOST)
    if high == MOST:
        return f"from {low}"
    most = "2^63 - 1" if high == 2**63 - 1 else f"{high:,}"
    return f"above {low}, to {most}" if entry.metadata.get("above_low") else f"{low} to {most}"


def test_a_row_that_is_missing_unknown_or_has_another_default_is_noticed() -> None:
    head = "| field | default | meaning |\n|---|---|---|\n"
    lines = [f"| `{name}` | `0` | What it counts. |\n" for name in defaults(Cost)]

    def is_right(*shown_lines: str) -> bool:
        page = f"# A page\n\n{head}{''.join(shown_lines)}\nEnd.\n"
        return documented(page, "field", ast.literal_eval) == defaults(Cost)

    assert is_right(*lines)
    assert not is_right(*lines[1:])
    assert not is_right(*lines, "| `num_else` | `0` | What it counts. |\n")
    for wrong in ("`1`", "`False`", "`0.0`", "0", NONE):
        assert not is_right(lines[0].replace("`0`", wrong), *lines[1:])
    with pytest.raises(AssertionError, match="of its own"):
        is_right(*lines, lines[0])


# --- docs/recipe.md -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_of_a_recipe_has_the_keys_and_defaults_of_the_code(name: str) -> None:
    expected = defaults(SECTIONS[name])
    if name == "head":
        with pytest.raises(InputError, match="`kind` must be"):
            HeadConfig()
        expected["kind"] = REQUIRED
    assert documented(section(RECIPE, f"`{name}`"), "key", yaml.safe_load) == expected


def test_training_has_every_key_that_is_ours_with_its_default() -> None:
    expected = {name: default(entry) for name, entry in TRAINING.items()}
    assert documented(section(RECIPE, "`training`"), "key", yaml.safe_load) == expected


def test_a_key_for_one_objective_stands_beside_the_objectives_that_read_it() -> None:
    own = {
        name: {entry.name for entry in fields(get_objective(name))} & TRAINING.keys()
        for name in objective_table()
    }
    shared = {entry.name for entry in fields(Objective)}
    expected = {
        key: {name for name, keys in own.items() if key in keys}
        for key in set().union(*own.values()) - shared
    }
    found = {
        key: set(re.findall(r"`(\w+)`", row["objective"]))
        for key, row in rows(section(RECIPE, "`training`"), "key").items()
        if "objective" in row
    }
    assert found == expected


def test_every_section_and_what_stands_elsewhere_is_named() -> None:
    for name in sections._SECTIONS:
        assert name == "output_dir" or section(RECIPE, f"`{name}`")
        assert f"`{name}`" in RECIPE.partition("\n## `model`")[0]
    in_python = section(RECIPE, "In Python")
    for argument, key in IN_DATA.items():
        assert f"`{argument}`" in in_python and f"`{key}`" in in_python
    assert "load_best_model_at_end" in OUT_OF_PLACE
    assert "`load_best_model_at_end` is one" in section(RECIPE, "`training`")
    numbers = rows(section(RECIPE, "`data`"), "key")["numbers"]["meaning"]
    for entry in fields(Numbers):
        assert re.search(rf"`{entry.name}` \({entry.default}\b", numbers)


def test_every_key_that_the_page_names_exists() -> None:
    """Ours and those of transformers; the rest is named here."""
    known = {entry.name for kind in SECTIONS.values() for entry in fields(kind)}
    known |= {entry.name for entry in fields(DMaxConfig)} | {
        entry.name for entry in fields(Numbers)
    }
    known |= objective_table().keys()
    others = {"model_type", "flex_attention", "save_to_disk", "shared_experts", "llada2_moe"}
    others |= {"eval_dataset", "eval_hook", "peft_config"}  # of `DMaxTrainer`
    others |= {"max_new_tokens"}  # of `DecodingParams`
    others |= {"word_problems"}  # a task
    named = set(re.findall(r"`([a-z]+\d?(?:_[a-z]+)+)`", RECIPE))
    assert named - known - others - {"output_dir"} == set()


def first_recipe(folder: Path, change: tuple[str, str] = ("", "")) -> Path:
    """The recipe that the page begins with, in a file of the name that the page gives it."""
    [content] = [content for _, language, content, _ in blocks(RECIPE) if language == "yaml"]
    path = folder / "first.yaml"
    path.write_text(content.replace(*change) if change[0] else content, encoding="utf-8")
    return path


def test_a_wrong_key_of_the_first_recipe_is_told_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first_recipe(tmp_path, ("learning_rate", "lerning_rate"))
    with pytest.raises(InputError) as caught:
        load_recipe("first.yaml")
    assert f"```text\nerror: {caught.value}\n```" in RECIPE


@pytest.mark.slow
@needs_models
def test_the_first_recipe_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for extra in ("accelerate", "datasets"):
        pytest.importorskip(extra)
    monkeypatch.chdir(tmp_path)
    folder = run_recipe(load_recipe(first_recipe(tmp_path), {"max_steps": 1}))
    assert (folder / "model.safetensors").is_file()


# --- docs/python.md -------------------------------------------------------------------------------


def test_every_public_name_stands_on_the_page() -> None:
    missing = [name for name in dmax._PUBLIC if not re.search(rf"`(?:dmax\.)?{name}\b", PYTHON)]
    assert not missing


def test_llm_has_the_arguments_options_and_methods_of_the_code() -> None:
    text = section(PYTHON, "`LLM`")
    arguments = {
        name: NONE if each.default is each.empty else repr(each.default)
        for name, each in inspect.signature(LLM).parameters.items()
        if each.kind is not each.VAR_KEYWORD
    }
    assert documented(text, "argument", ast.literal_eval) == arguments
    assert documented(text, "option", ast.literal_eval) == defaults(EngineOptions)
    methods = {name for name in vars(LLM) if not name.startswith("_")}
    named = set(re.findall(r"`(?:LLM\.)?(\w+)\(", text))
    assert methods <= named, methods - named


@pytest.mark.parametrize(
    ("title", "first", "kind"),
    [("`DecodingParams`", "field", DecodingParams), ("`LLM`", "option", EngineOptions)],
)
def test_ranges_are_those_of_the_code(title: str, first: str, kind: type) -> None:
    found = rows(section(PYTHON, title), first)
    expected = {entry.name: bounds(entry) for entry in fields(kind)}
    assert {name: found[name]["range"] for name, range_ in expected.items() if range_} == {
        name: range_ for name, range_ in expected.items() if range_
    }


def test_decoding_params_have_every_field_with_its_default() -> None:
    text = section(PYTHON, "`DecodingParams`")
    assert documented(text, "field", ast.literal_eval) == defaults(DecodingParams)


def test_an_output_has_every_field_and_property_and_what_it_cost() -> None:
    text = section(PYTHON, "`GenerationOutput`")
    found = rows(text, "field or property")
    assert found.keys() == defaults(GenerationOutput).keys() | properties(GenerationOutput)
    cost = defaults(Cost) | dict.fromkeys(properties(Cost), NONE)
    assert documented(text, "of `cost`", ast.literal_eval) == cost
    reasons = re.findall(r'`"(\w+)"`', found["finish_reason"]["meaning"])
    assert set(reasons) == set(get_args(FinishReason))


def test_an_event_has_every_field_with_its_default() -> None:
    text = section(PYTHON, "`StreamEvent`")
    assert documented(text, "field", ast.literal_eval) == defaults(StreamEvent)


@needs_models
def test_the_python_of_the_page_runs_and_prints_what_is_written_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for extra in ("accelerate", "datasets"):
        pytest.importorskip(extra)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}  # one for all: later blocks go on from earlier ones
    for line, language, content, is_run in blocks(PYTHON):
        assert language in ("python", "") and is_run
        exec(compile("\n" * (line - 1) + content, "python.md", "exec"), namespace)
        printed = capsys.readouterr().out.splitlines()
        said = re.findall(r"^# (.*)", content, re.MULTILINE)
        assert [line for line in said if line not in printed] == []
    assert (tmp_path / "runs" / "python" / "model.safetensors").is_file()
