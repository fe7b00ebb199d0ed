"""Published tables as data: what comes with dmax agrees with itself, and mistakes name a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmax.decoding import get_strategy
from dmax.errors import InputError
from dmax.reproduce.table import load_table, table_names
from dmax.tasks import get_task
from dmax.tasks.published import published_tasks

MINIMAL = """\
title: A table
source: a paper
setting: a GPU
scoring: published
models:
  ours: {hub: tiny-dmax}
benchmarks:
  gsm8k: {label: GSM8K, examples: 8}
rows:
  first:
    label: First
    model: ours
    decoding: {strategy: spd, threshold: 0.5}
    paper:
      gsm8k: {accuracy: 90.0}
"""


def test_table1_has_every_cell_of_the_paper() -> None:
    table = load_table("table1")
    methods: dict[str, list[str]] = {}
    for cell in table.cells():
        methods.setdefault(cell.benchmark, []).append(cell.row)
    others = ["base", "hierarchical", "dparallel", "uniform"]
    maths = ("gsm8k", "math500", "minerva_algebra", "asdiv")
    assert methods == {
        **dict.fromkeys(maths, [*others, "dmax-math"]),
        **dict.fromkeys(("humaneval", "mbpp"), [*others, "dmax-coder"]),
    }
    assert sum(column.examples for column in table.benchmarks.values()) == 5902
    assert table.models["dmax-math"].hub == "Zigeng/DMax-Math-16B"
    assert table.models["dmax-coder"].hub == "Zigeng/DMax-Coder-16B"
    assert table.models["uniform"].hub is None


def test_table1_gives_the_means_that_the_paper_states() -> None:
    table = load_table("table1")
    cells = list(table.cells())

    def mean(name: str, *rows: str) -> float:
        found = [
            getattr(table.rows[cell.row].published[cell.benchmark], name)
            for cell in cells
            if cell.row in rows
        ]
        return sum(found) / len(found)

    dmax = ("dmax-math", "dmax-coder")
    assert mean("tps", *dmax) == pytest.approx(1338.2, abs=0.05)  # 1,338 in the abstract
    assert mean("tpf", "base") == pytest.approx(2.79, abs=0.005)
    assert mean("tpf", *dmax) == pytest.approx(6.215, abs=0.0005)
    assert mean("tpf", "dmax-math") == pytest.approx(6.02, abs=0.005)
    assert mean("tpf", "dmax-coder") == pytest.approx(6.61, abs=0.005)
    assert mean("tps", "base") == pytest.approx(685, abs=0.5)


def test_every_row_is_decoded_as_the_paper_says() -> None:
    table = load_table("table1")
    for row in table.rows.values():
        assert (row.params.max_new_tokens, row.params.block_length) == (2048, 32)
        assert (row.params.temperature, row.params.stop_confidence) == (0.0, 0.9)
    thresholds = {name: row.params.threshold for name, row in table.rows.items()}
    assert thresholds["base"] == 0.95
    assert (thresholds["dmax-math"], thresholds["dmax-coder"]) == (0.5, 0.65)
    hierarchical = get_strategy(table.rows["hierarchical"].params)
    assert getattr(hierarchical, "low") == 0.2  # noqa: B009  # only this strategy has it


def test_throughput_is_the_dmax_rows_of_table1() -> None:
    table, whole = load_table("throughput"), load_table("table1")
    assert (table.requires.engine, table.requires.tensor_parallel) == ("vllm", 2)  # type: ignore[union-attr]
    assert (table.batch_size, table.mean_tps) == (1, 1338)
    for name, row in table.rows.items():
        assert row.params == whole.rows[name].params
        for benchmark, published in row.published.items():
            same = whole.rows[name].published[benchmark]
            assert (published.accuracy, published.tpf, published.tps) == (
                same.accuracy,
                same.tpf,
                same.tps,
            )


def test_cells_that_stand_in_two_tables_are_the_same() -> None:
    cells = {
        (table.models[row.model].hub, str(get_strategy(row.params)), benchmark): set[object]()
        for table in map(load_table, table_names())
        for row in table.rows.values()
        for benchmark in row.published
    }
    for table in map(load_table, table_names()):
        for row in table.rows.values():
            for benchmark, published in row.published.items():
                key = (table.models[row.model].hub, str(get_strategy(row.params)), benchmark)
                cells[key].add((published.accuracy, published.tpf))
    assert [key for key, values in cells.items() if len(values) > 1] == []


@pytest.mark.parametrize("name", table_names())
def test_every_table_names_tasks_with_a_published_scoring(name: str) -> None:
    assert load_table(name).benchmarks.keys() <= set(published_tasks())


def test_the_fixtures_have_the_fields_of_the_published_files() -> None:
    for name in published_tasks():
        task = get_task(name, Path(__file__).parent / "fixtures" / f"{name}.jsonl")
        assert len(task.examples(100, seed=0)) == 8


def test_a_table_of_ones_own_is_named_by_its_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(MINIMAL, encoding="utf-8")
    table = load_table(str(file))
    assert (table.name, [cell.name for cell in table.cells()]) == ("mine", ["first.gsm8k"])
    assert table.batch_size == 1


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("scoring: published", "scoring: kind", 4, "must be published or strict, got 'kind'"),
        ("title: A table\n", "", 0, "`title` is missing"),
        ("title: A table", "titel: A table", 1, "unknown key `titel`"),
        ("model: ours", "model: our", 12, "must be one of ours, got 'our'"),
        ("      gsm8k: {acc", "      gsm9k: {acc", 15, "`gsm9k` is not among the `benchmarks`"),
        ("  gsm8k: {label", "  word_problems: {label", 8, "none of the tasks with a published"),
        ("accuracy: 90.0", "accuracy: 900.0", 15, "must be a number between 0 and 100, got 900"),
        ("accuracy: 90.0", "accuracy: high", 15, "must be float, got 'high'"),
        ("accuracy: 90.0", "tpf: 2.0", 15, "`accuracy` is missing"),
        ("threshold: 0.5", "threshold: 1.5", 13, "`threshold` must be a number between 0 and 1"),
        ("strategy: spd", "strategy: sdp", 13, "unknown strategy 'sdp'"),
        ("threshold: 0.5", "treshold: 0.5", 13, "unknown key `rows.first.decoding.treshold`"),
        ("{hub: tiny-dmax}", "{}", 6, "a model has either `hub` or `missing`"),
        ("examples: 8", "examples: 0", 8, "`examples` must be a whole number between 1 and"),
        ("label: First", "label: ''", 11, "must be a text, got ''"),
        ("  first:", "  fir/st:", 10, "a name has letters, digits"),
        ("title: A table", "title: A table\nbatch_size: 0", 2, "`batch_size` must be a whole"),
        (
            "title: A table",
            "title: A table\nrequires: {engine: trt}",
            2,
            "`engine` must be one of dmax, vllm, sglang",
        ),
    ],
)
def test_a_mistake_is_one_sentence_with_its_line(
    tmp_path: Path, old: str, new: str, line: int, message: str
) -> None:
    assert old in MINIMAL
    file = tmp_path / "mine.yaml"
    file.write_text(MINIMAL.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_table(str(file))
    assert message in error.value.message
    assert error.value.message.startswith(f"{file}:{line}: " if line else f"{file}: ")


@pytest.mark.parametrize(
    ("name", "hint"), [("tabel1", "did you mean `table1`?"), ("x", "dmax reproduce --list")]
)
def test_an_unknown_table_is_refused(name: str, hint: str) -> None:
    with pytest.raises(InputError, match="unknown table") as error:
        load_table(name)
    assert hint in str(error.value.hint)
