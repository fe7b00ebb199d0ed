"""Result files: what is written when, going on after an interruption, nothing lost unasked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_run import PARAMS, Canned, Sums

from dmax import DecodingParams, GenerationOutput, InputError
from dmax.completers import LocalCompleter
from dmax.evaluation.results import ResultFiles, differences
from dmax.evaluation.run import Sample, Summary, evaluate
from dmax.files import write_atomically
from dmax.outputs import as_record

SIX = 6  # two chunks of the canned model: four examples and two


class Repeating(Canned):
    """`Canned` for any number of examples; it is interrupted before the chunk `dies_at`."""

    def __init__(self, dies_at: int | None = None) -> None:
        super().__init__()
        self.dies_at = dies_at
        self.asked = list[str]()

    def generate(
        self, prompts: Sequence[Any], params: DecodingParams, progress: Callable[[int, int], None]
    ) -> list[GenerationOutput]:
        if len(self.sizes) == self.dies_at:
            raise KeyboardInterrupt
        self.asked += [message["content"] for (message,) in prompts]
        shortened = [
            [{**message, "content": message["content"].replace(".5)", ".1)")}]
            for (message,) in prompts
        ]
        return super().generate(shortened, PARAMS, progress)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "tiny_spd_0.5.json"


def run(
    path: Path,
    llm: Repeating | None = None,
    params: DecodingParams = PARAMS,
    limit: int = SIX,
    **options: Any,
) -> tuple[Summary, list[Sample]]:
    files = ResultFiles(path, **options)
    model: Any = llm or Repeating()
    summary, samples = evaluate(
        LocalCompleter(model), Sums(), params, limit=limit, seed=7, journal=files
    )
    files.finish(summary, samples)
    return summary, samples


def interrupt(path: Path, **options: Any) -> Path:
    with pytest.raises(KeyboardInterrupt):
        run(path, Repeating(dies_at=1), **options)
    return path.with_name("tiny_spd_0.5.partial.jsonl")


def names(path: Path) -> set[str]:
    return {file.name.removeprefix("tiny_spd_0.5.") for file in path.parent.iterdir()}


def timeless(summary: Summary) -> dict[str, Any]:
    record = as_record(replace(summary, seconds=0.0, tokens_per_second=0.0))
    del record["environment"]["date"]
    return record


def test_results_are_a_summary_and_the_samples_beside_it(path: Path) -> None:
    summary, samples = run(path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(as_record(summary)))
    lines = path.with_name("tiny_spd_0.5.samples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [as_record(sample) for sample in samples]
    assert names(path) == {"json", "samples.jsonl"}


def test_a_summary_names_all_that_its_figures_depend_on(path: Path) -> None:
    run(path)
    record = json.loads(path.read_text())
    for name in ("weights", "examples"):
        assert len(record[name]) == 16 and int(record[name], 16) >= 0
    assert record["params"].keys() == asdict(PARAMS).keys()
    assert record["params"]["threshold"] is None and "threshold=0.5" in record["decoding"]
    assert (record["dtype"], record["block_length"], record["batch_size"]) == ("float32", 32, 1)
    assert record["environment"].keys() >= {
        "dmax",
        "torch",
        "transformers",
        "python",
        "cpu",
        "device",
        "date",
    }
    low, high = record["interval"]
    assert low < record["accuracy"] < high


def test_samples_are_written_as_they_are_finished(path: Path) -> None:
    partial = interrupt(path)
    assert names(path) == {"partial.jsonl"}
    first, *lines = map(json.loads, partial.read_text().splitlines())
    assert first["settings"]["limit"] == SIX
    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    assert all(line["seconds"] > 0 and line["prompt"] for line in lines)


def test_an_interrupted_run_goes_on_where_it_stopped(path: Path, tmp_path: Path) -> None:
    whole, samples = run(tmp_path / "whole.json")
    partial = interrupt(path)
    told = list[str]()
    llm = Repeating()
    spent = sum(json.loads(line)["seconds"] for line in partial.read_text().splitlines()[1:])
    summary, resumed = run(path, llm, report=told.append)
    assert [question[-3:] for question in llm.asked] == [".4)", ".5)"]
    assert told == ["going on with an interrupted run: 4 samples are finished already"]
    assert resumed == samples
    assert timeless(summary) == timeless(whole)
    assert summary.seconds > spent  # of both parts
    assert summary.tokens_per_second == pytest.approx(summary.generated_tokens / summary.seconds)
    assert names(path) == {"json", "samples.jsonl"}


@pytest.mark.parametrize("torn", ['{"index": 4, "pro', '{"index": 4}', "{"])
def test_a_line_that_was_cut_off_is_dropped(path: Path, tmp_path: Path, torn: str) -> None:
    whole, samples = run(tmp_path / "whole.json")
    partial = interrupt(path)
    llm = Repeating()
    with partial.open("a") as file:
        file.write(torn)
    summary, resumed = run(path, llm)
    assert len(llm.asked) == 2
    assert (timeless(summary), resumed) == (timeless(whole), samples)


def test_a_run_cut_anywhere_gives_the_same_summary(path: Path, tmp_path: Path) -> None:
    whole, samples = run(tmp_path / "whole.json")
    data = interrupt(path).read_bytes()
    header = data.index(b"\n") + 1
    for end in range(header, len(data), 37):
        path.with_name("tiny_spd_0.5.partial.jsonl").write_bytes(data[:end])
        summary, resumed = run(path, overwrite=True)
        assert (timeless(summary), resumed) == (timeless(whole), samples)


def test_a_run_that_only_lacked_its_summary_decodes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(file: Path, text: str) -> None:
        if file == path:
            raise InputError("disk full")
        write_atomically(file, text)

    monkeypatch.setattr("dmax.evaluation.results.write_atomically", fails)
    with pytest.raises(InputError, match="disk full"):
        run(path)
    monkeypatch.undo()
    assert names(path) == {"partial.jsonl", "samples.jsonl"}
    llm = Repeating()
    assert run(path, llm)[0].total == SIX
    assert llm.asked == []


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["json", "samples.jsonl"])
def test_a_finished_run_is_not_overwritten(path: Path, kept: str) -> None:
    run(path)
    for file in list(path.parent.iterdir()):
        if not file.name.endswith(f"0.5.{kept}"):
            file.unlink()
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(InputError, match="holds the results of a finished run") as refused:
        ResultFiles(path)
    assert "--overwrite" in str(refused.value)
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def retrained(llm: Repeating) -> None:
    llm.model = SimpleNamespace(
        **vars(Canned.model) | {"state_dict": lambda: {"weight": torch.ones(1)}}
    )


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"limit": 7}, "limit was 6 and is 7"),
        (
            {"params": replace(PARAMS, threshold=0.7)},
            "params.threshold was None and is 0.7, decoding was ",
        ),
        (
            {"params": replace(PARAMS, strategy="credit", options={"alpha": 0.1})},
            "params.strategy was 'spd' and is",
        ),
        ({"llm": retrained}, "weights was "),
    ],
)
def test_an_interrupted_run_of_other_settings_is_refused(
    path: Path, change: dict[str, Any], part: str
) -> None:
    partial = interrupt(path)
    before = partial.read_bytes()
    llm = Repeating()
    prepare: Callable[[Repeating], None] = change.pop("llm", lambda llm: None)
    prepare(llm)
    with pytest.raises(InputError, match="interrupted run with other settings: ") as refused:
        run(path, llm, **change)
    assert part in str(refused.value) and "\n" not in refused.value.message
    assert llm.asked == []
    assert (names(path), partial.read_bytes()) == ({"partial.jsonl"}, before)


def test_differences_are_named_but_for_the_date() -> None:
    old = {"a": 1, "b": {"c": 2, "d": 3}, "environment": {"date": "x", "torch": "2"}, "gone": 1}
    new = {"a": 1, "b": {"c": 2, "d": 4}, "environment": {"date": "y", "torch": "3"}, "new": None}
    assert list(differences(old, new)) == [
        "b.d was 3 and is 4",
        "environment.torch was '2' and is '3'",
        "gone was 1 and is None",
    ]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "notes",
        "{}\n",
        "[]\n",
        '{"settings": -1}\n',
        '{"settings": {}}\n{"index": 1}\n',
        "a\nb\n",
    ],
)
def test_a_file_of_something_else_is_left_alone(path: Path, content: str) -> None:
    partial = path.with_name("tiny_spd_0.5.partial.jsonl")
    partial.parent.mkdir()
    partial.write_text(content)
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"partial.jsonl is not an interrupted run"):
            run(path, overwrite=overwrite)
    assert partial.read_text() == content


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("index", [1]),
        ("output", -1),
        ("num_capped", [[0]]),
        ("generated_tokens", "5"),
        ("seconds", None),
        ("is_correct", "yes"),
        ("bogus", 1),
    ],
)
def test_a_sample_of_another_shape_is_not_taken_for_ours(
    path: Path, name: str, value: object
) -> None:
    partial = interrupt(path)
    first, second, *others = partial.read_text().splitlines()
    changed = json.dumps({**json.loads(second), name: value})
    text = "\n".join([first, changed, *others]) + "\n"
    partial.write_text(text)
    with pytest.raises(InputError, match=r"partial.jsonl is not an interrupted run"):
        run(path)
    assert partial.read_text() == text


def test_words_after_our_lines_are_left_alone(path: Path) -> None:
    partial = interrupt(path)
    text = partial.read_text() + "to do: read these"
    partial.write_text(text)
    with pytest.raises(InputError, match=r"partial.jsonl is not an interrupted run"):
        run(path, overwrite=True)
    assert partial.read_text() == text


@pytest.mark.parametrize("name", ["json", "samples.jsonl"])
@pytest.mark.parametrize("content", ["notes", '{"mine": 1}', '{"mine": 1}\n{"mine": 2}\n'])
def test_no_result_replaces_a_file_of_something_else(path: Path, name: str, content: str) -> None:
    path.parent.mkdir()
    file = path.with_name(f"tiny_spd_0.5.{name}")
    file.write_text(content)
    for overwrite in (False, True):
        with pytest.raises(InputError, match="exists and was not written by this command"):
            ResultFiles(path, overwrite=overwrite)
    assert file.read_text() == content


# --- overwriting ----------------------------------------------------------------------------------


def test_overwriting_replaces_a_finished_run_once_the_new_one_is_complete(path: Path) -> None:
    run(path)
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    interrupt(path, overwrite=True, limit=5)
    assert before.items() <= {file: file.read_bytes() for file in path.parent.iterdir()}.items()
    llm = Repeating()
    run(path, llm, overwrite=True, limit=5)  # the same command goes on
    assert len(llm.asked) == 1
    assert json.loads(path.read_text())["limit"] == 5
    assert len(path.with_name("tiny_spd_0.5.samples.jsonl").read_text().splitlines()) == 5
    assert names(path) == {"json", "samples.jsonl"}


def test_overwriting_replaces_an_interrupted_run_of_other_settings(path: Path) -> None:
    partial = interrupt(path)
    before = partial.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        run(path, Repeating(dies_at=0), limit=5, overwrite=True)
    assert partial.read_bytes() == before  # there is nothing yet to put in its place
    llm = Repeating()
    assert run(path, llm, limit=5, overwrite=True)[0].total == 5
    assert len(llm.asked) == 5
