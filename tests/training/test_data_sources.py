"""Training from files, streams and tables of `datasets`, through recipes and in Python."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import losses, write_recipe

from dmax import extras
from dmax.checkpoint import load_checkpoint
from dmax.errors import InputError
from dmax.recipe.run import run_recipe
from dmax.recipe.sections import load_recipe
from dmax.training.config import DMaxConfig
from dmax.training.trainer import DMaxTrainer

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")

SHORT = {"objective": "mdlm", "max_steps": 2, "save_steps": 2}
ROWS = [
    {"problem": f"Tom has {n} apples.", "solution": f"He has {n}.", "messages": None}
    for n in range(12)
]
LONG = {"problem": "Tom has 3 apples. " * 30, "solution": "He has 3.", "messages": None}


def train(folder: Path, **changes: Any) -> tuple[list[str], list[dict[str, float]]]:
    """What a run reports, and the losses that it logs."""
    folder.mkdir(exist_ok=True)
    told: list[str] = []
    changes["training"] = SHORT | changes.get("training", {})
    run_recipe(load_recipe(write_recipe(folder, **changes)), report=told.append)
    return told, losses(folder)


def test_every_form_of_the_same_records_trains_the_same(tmp_path: Path) -> None:
    lines = tmp_path / "data.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    folder = tmp_path / "folder"
    folder.mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "train-0.parquet")
    _, expected = train(tmp_path / "a", data={"file": str(lines)})
    _, parquet = train(tmp_path / "b", data={"file": str(folder), "reader": "numina"})
    columns = {"prompt": "problem", "response": "solution"}
    _, named = train(tmp_path / "c", data={"file": str(lines), "columns": columns, "num_proc": 2})
    assert expected == parquet == named
    assert len(expected) == 2


def test_the_hub_is_one_key_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, name: str | None, **options: Any) -> Any:
        assert (path, name, options["split"]) == ("AI-MO/NuminaMath-CoT", None, "train[:12]")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = {"hub": "AI-MO/NuminaMath-CoT", "split": "train[:12]"}
    told, _ = train(tmp_path, data=data)
    assert told[0].startswith("12 examples, ")


@pytest.mark.parametrize(
    ("too_long", "message"),
    [
        ("skip", "left out 1 of 13 examples, longer than 64 tokens"),
        ("truncate", "left out 1 of 13 examples, longer than 64 tokens"),
    ],
)
def test_what_is_left_out_is_reported(tmp_path: Path, too_long: str, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, LONG]))
    told, _ = train(tmp_path, data={"file": str(file), "max_length": 64, "too_long": too_long})
    assert told[0] == message
    with pytest.raises(InputError, match="data.jsonl:13: .* `max_length` 64"):
        train(tmp_path / "error", data={"file": str(file), "max_length": 64})


def test_a_stream_is_resumed_where_it_stood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {"file": str(file), "streaming": True, "seed": 5}
    steps = {"max_steps": 9, "save_steps": 4}  # more than the stream has: it begins anew
    told, whole = train(tmp_path / "whole", data=data, training=steps)
    assert told[0].startswith("a stream of examples, ")
    compute_loss = DMaxTrainer.compute_loss

    def dies(self: DMaxTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DMaxTrainer, "compute_loss", dies)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "broken", data=data, training=steps)
    assert train(tmp_path / "broken", data=data, training=steps)[1] == whole
    assert len({line["loss"] for line in whole}) > 6


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"file": "a.jsonl", "hub": "a/b"}, "exactly one of `file`, `hub` and `problems`"),
        ({"problems": 4, "split": "test"}, "`data.split` belongs to `data.file` or `data.hub`"),
        ({"problems": 4, "reader": "numina"}, "`data.reader` belongs to"),
        ({"file": "a.jsonl", "revision": "main"}, "`data.revision` belongs to `data.hub`"),
        ({"file": "a.jsonl", "numbers": {}}, "`data.numbers` belongs to `data.problems`"),
        ({"file": "a.jsonl", "reader": "numinas"}, "in `data.reader`, `reader` must be one of"),
        ({"file": "a.jsonl", "columns": {"prompts": "a"}}, "in `data.columns`, `columns` names"),
        ({"problems": 4, "too_long": "cut"}, "in `data.too_long`, `too_long` must be one of"),
        ({"problems": 4, "num_proc": 0}, "in `data.num_proc`, `num_proc` must be"),
    ],
)
def test_bad_data_sections_name_their_line(
    tmp_path: Path, data: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=rf"recipe.yaml:\d+: .*{message}"):
        load_recipe(write_recipe(tmp_path, data=data))


def test_problems_of_the_generator_need_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"problems": 8, "seed": 2}
    told, expected = train(tmp_path / "with", data=data)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(extras, "find_spec", lambda module: None)
    assert train(tmp_path / "without", data=data) == (told, expected)
    with pytest.raises(InputError, match="training data needs the package `datasets`"):
        train(tmp_path / "file", data={"file": __file__})
    with pytest.raises(InputError, match="a stream needs the package `datasets`"):
        train(tmp_path / "stream", data=data | {"streaming": True})


def test_a_stream_needs_a_last_step(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, data={"problems": 4, "streaming": True}, training={"max_steps": -1}
    )
    with pytest.raises(InputError, match="`data.streaming` needs `training.max_steps`"):
        load_recipe(recipe)
    recipe = write_recipe(tmp_path, training={"max_length": 512})
    with pytest.raises(InputError, match="`training.max_length` is `data.max_length` in a recipe"):
        load_recipe(recipe)


def test_in_python_a_table_of_records_is_encoded_by_the_trainer(tmp_path: Path) -> None:
    checkpoint = load_checkpoint("tiny-base", dtype=torch.float32, device="cpu")
    told: dict[str, list[list[int]]] = {}
    for name, rows in {
        "records": [*ROWS, LONG],
        "table": datasets.Dataset.from_list([*ROWS, LONG]),
        "stream": datasets.Dataset.from_list([*ROWS, LONG]).to_iterable_dataset(),
    }.items():
        args = DMaxConfig(
            output_dir=str(tmp_path),
            max_length=80,
            too_long="skip",
            use_cpu=True,
            report_to="none",
            max_steps=1,
        )
        trainer = DMaxTrainer(
            checkpoint.model,
            args,
            rows,
            special_ids=checkpoint.special_ids,
            processing_class=checkpoint.tokenizer,
        )
        batches = list(trainer.get_train_dataloader())
        told[name] = sorted(batch["clean_ids"].tolist()[0] for batch in batches)
        if name == "stream":
            trainer.train()
            assert trainer.state.global_step == 1
    assert len(told["records"]) == 12
    assert told["records"] == told["table"] == told["stream"]
