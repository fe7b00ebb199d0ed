"""A table end to end on the bundled models: wiring, counting, going on, refusals, pages."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_llama
from test_cli import Dmax, dmax_fixture  # noqa: F401  (a fixture)

from dmax import LLM
from dmax.checkpoint import save_checkpoint
from dmax.completers import LocalCompleter
from dmax.errors import InputError
from dmax.outputs import GenerationOutput
from dmax.reproduce import engines
from dmax.reproduce.cells import hardware
from dmax.reproduce.engines import EngineChoice
from dmax.reproduce.folder import TableFolder
from dmax.reproduce.page import html, lines, markdown
from dmax.reproduce.plan import Plan
from dmax.reproduce.run import TableRun
from dmax.reproduce.table import CANNOT_RUN, NOT_AVAILABLE, NOT_RUN, load_table
from dmax.sandbox import KINDS, works
from dmax.tasks import get_task

FIXTURES = Path(__file__).parent / "fixtures"
BENCHMARKS = ("gsm8k", "math500", "minerva_algebra", "asdiv", "humaneval", "mbpp")
DATA = {name: str(FIXTURES / f"{name}.jsonl") for name in BENCHMARKS}
BUNDLED = {
    "llada2-mini": "tiny-base",
    "llada2-mini-cap": "tiny-base",
    "dmax-math": "tiny-dmax",
    "dmax-coder": "tiny-dmax",
}
ENGINE = EngineChoice(batch_size=4, dtype="float32", device="cpu")
needs_isolation = pytest.mark.skipif(
    not any(map(works, KINDS)), reason="no isolation for foreign code works here"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of random weights, which decodes in a moment."""
    torch.manual_seed(0)
    made = small_llama()
    folder = tmp_path_factory.mktemp("small")
    save_checkpoint(made.model, made.tokenizer, folder, made.special_ids)
    return str(folder)


@pytest.fixture
def a_plan(checkpoint: str) -> Callable[..., Plan]:
    """Makes a plan whose checkpoints are all the small one, with the fixtures as rows."""

    def make(*only: str, table: str = "table1", **changes: Any) -> Plan:
        loaded = load_table(table)
        settings = {
            "models": {name: checkpoint for name, source in loaded.models.items() if source.hub},
            "data": {name: file for name, file in DATA.items() if name in loaded.benchmarks},
            "max_new_tokens": 40,
        }
        return Plan(loaded, ENGINE, only=only, **(settings | changes))

    return make


MakePlan = Callable[..., Plan]


def run(plan: Plan, path: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """The records of all cells, after a run."""
    plan.check()
    folder = TableFolder(path, plan.settings(), **options)
    TableRun(plan, folder, lambda title: nullcontext(lambda done, total: None)).run()
    return records_of(plan, path)


def records_of(plan: Plan, path: Path) -> dict[str, dict[str, Any]]:
    folder = TableFolder(path, plan.settings())
    found = ((cell.name, folder.cell(cell)) for cell in plan.table.cells())
    return {name: record for name, record in found if record is not None}


def samples_of(path: Path, cell: str) -> list[dict[str, Any]]:
    text = (path / "decoded" / f"{cell}.samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


class Interrupted(LocalCompleter):
    """A model that is stopped before its group of completions number `dies_at`."""

    dies_at = 0
    asked: list[int] = []

    def completions(self, prompts: Any, params: Any, progress: Any) -> Iterator[Any]:
        self.asked.append(len(prompts))
        for group in super().completions(prompts, params, progress):
            if self.dies_at == 0:
                raise KeyboardInterrupt
            Interrupted.dies_at -= 1
            for pair in group:  # each alone, so that the interruption falls within a batch
                yield [pair]


# --- wiring and counting --------------------------------------------------------------------------


@needs_isolation
def test_all_six_benchmarks_from_the_command_line(dmax: Dmax, tmp_path: Path) -> None:
    path = tmp_path / "table"
    words = ["--output", path, "--max-new-tokens", 32, "--batch-size", 8, "--dtype", "float32"]
    words += ["--limit", 4]
    for name, stand_in in BUNDLED.items():
        words += ["--model", f"{name}={stand_in}"]
    for name, file in DATA.items():
        words += ["--data", f"{name}={file}"]
    only = ["--only", "dmax-math", "--only", "dmax-coder", "--only", "uniform"]
    result = dmax("reproduce", "table1", *words, *only)
    assert result.code == 0, result.err
    measured = [*(f"dmax-math.{name}" for name in BENCHMARKS[:4])]
    measured += [f"dmax-coder.{name}" for name in BENCHMARKS[4:]]
    for name in measured:
        record = json.loads((path / "cells" / f"{name}.json").read_text(encoding="utf-8"))
        assert record["status"] == "measured"
        assert record["scores"].keys() == {"strict", "published"}
        assert [score["total"] for score in record["scores"].values()] == [4, 4]
        assert len(samples_of(path, name)) == 4
        assert record["trial"][0].startswith("4 of ")
        assert record["model"] == "tiny-dmax" and record["replaces"].startswith("Zigeng/DMax-")
    assert result.out.count("not available: the authors have released no weights") == 6
    assert result.out.count("not run yet; 92.6 %, TPF 2.04, 512 tokens/s in the paper") == 1
    assert str(path / "report.html") in result.out
    again = dmax("reproduce", "table1", *words, *only, "--json")
    cells = json.loads(again.out)["cells"]
    assert len(cells) == 30
    statuses = {cell["cell"]: cell["status"] for cell in cells}
    assert {name for name, status in statuses.items() if status == "measured"} == set(measured)
    assert "decoding" not in again.err  # nothing was left to do


def test_what_a_cell_counts_follows_from_its_samples(a_plan: MakePlan, tmp_path: Path) -> None:
    plan = a_plan("dmax-math", "gsm8k", "asdiv")
    records = run(plan, tmp_path)
    assert records.keys() == {"dmax-math.gsm8k", "dmax-math.asdiv"}
    for name, record in records.items():
        samples = samples_of(tmp_path, name)
        tokens = [each["generated_tokens"] for each in samples]
        forwards = [each["num_forwards"] for each in samples]
        prefills = [each["num_prefill_forwards"] for each in samples]
        assert record["tpf"] == pytest.approx(sum(tokens) / sum(forwards))
        ratios = [n / (f + min(p, 1)) for n, f, p in zip(tokens, forwards, prefills, strict=True)]
        assert record["tpf_paper"]["value"] == pytest.approx(sum(ratios) / 8)
        low, high = record["tpf_paper"]["interval"]
        assert min(ratios) <= low < record["tpf_paper"]["value"] < high <= max(ratios)
        assert record["tokens_per_second"] == pytest.approx(
            sum(tokens) / record["summary"]["seconds"]
        )
        strict = [number for number, each in enumerate(samples) if not each["is_correct"]]
        assert record["wrong"]["strict"] == strict
        assert record["scores"]["strict"]["correct"] == 8 - len(strict)
        assert record["summary"]["correct"] == 8 - len(strict)


def test_both_scorings_are_of_the_same_completions(
    a_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completions that a model could have given; each is scored by hand under both scorings."""
    completions = [
        ("So it is \\boxed{67}.", True, True),
        ("So it is \\boxed{15}.\nThat is 210 / 15 = 14", False, True),  # the box counts strictly
        ("48 * 30 = 1440\n#### 1,440", True, True),
        ("She has $11.50 left.", True, True),
        ("It was 9-4", False, False),  # strictly 4, there -4
        ("There are 8 cuts.\nThe pieces are 4 metres long.", False, True),  # the line before
        ("I cannot say.", False, False),
        ("It is incorrect to say anything but 360", True, False),  # "incorrect": passed over
    ]

    def answer(
        self: LLM, prompts: Sequence[Any], params: Any, progress: Callable[[int, int], None]
    ) -> list[GenerationOutput]:
        texts = {
            example.prompt: text
            for example, (text, _, _) in zip(examples, completions, strict=True)
        }
        outputs = generate(self, prompts, params, progress)
        pairs = zip(prompts, outputs, strict=True)
        return [replace(output, text=texts[prompt[0]["content"]]) for prompt, output in pairs]

    examples = get_task("gsm8k", DATA["gsm8k"]).examples(8, seed=0)
    generate = LLM.generate
    monkeypatch.setattr(LLM, "generate", answer)
    record = run(a_plan("dmax-math", "gsm8k"), tmp_path)["dmax-math.gsm8k"]
    for place, name in enumerate(("strict", "published"), 1):
        right = [bool(each[place]) for each in completions]
        assert record["scores"][name]["correct"] == sum(right)
        assert record["wrong"][name] == [number for number, each in enumerate(right) if not each]
    assert record["scores"]["strict"]["correct"] == 4
    assert record["scores"]["published"]["correct"] == 5


def test_the_recipe_decides_how_a_cell_is_decoded(a_plan: MakePlan, tmp_path: Path) -> None:
    records = run(a_plan("gsm8k", "base", "hierarchical", limit=2), tmp_path)
    base, hierarchical = (records[f"{row}.gsm8k"]["summary"] for row in ("base", "hierarchical"))
    assert base["decoding"] == "ThresholdDecoding(threshold=0.95)"
    assert hierarchical["decoding"] == "HierarchyDecoding(threshold=0.9, low=0.2)"
    assert base["params"]["max_new_tokens"] == 40
    assert base["batch_size"] == 4
    assert records["base.gsm8k"]["trial"] == [
        "2 of 1,319 examples",
        "40 new tokens at most in place of 2,048",
    ]


def test_weights_that_nobody_has_can_be_given(
    checkpoint: str, a_plan: MakePlan, tmp_path: Path
) -> None:
    models = {"uniform": checkpoint}
    record = run(a_plan("uniform", "asdiv", models=models, limit=2), tmp_path)["uniform.asdiv"]
    assert record["status"] == "measured"
    assert record["replaces"] == "the authors have released no weights of this control"
    assert "soft_inputs=False" in record["summary"]["decoding"]


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dies_at", "asked"),
    [
        (0, [8, 8, 8]),  # nothing was finished: both cells from their first example
        (1, [8, 4, 8]),  # four of the first cell were
        (2, [8, 8, 8]),  # the first cell was, and nothing of the second
        (3, [8, 8, 4]),
    ],
)
def test_an_interrupted_run_goes_on_at_the_sample(
    a_plan: MakePlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dies_at: int,
    asked: list[int],
) -> None:
    plan = a_plan("gsm8k", "dmax-math", "base")
    whole = run(plan, tmp_path / "whole")
    monkeypatch.setattr("dmax.completers.CHUNK_BATCHES", 1)  # groups of four
    monkeypatch.setattr("dmax.completers.LocalCompleter", Interrupted)
    monkeypatch.setattr(Interrupted, "dies_at", dies_at)
    monkeypatch.setattr(Interrupted, "asked", [])
    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path / "parts")
    monkeypatch.setattr(Interrupted, "dies_at", 100)
    parts = run(plan, tmp_path / "parts")
    assert Interrupted.asked == asked
    for name, record in whole.items():
        same = ("scores", "wrong", "tpf", "tpf_paper", "published")
        assert {key: parts[name][key] for key in same} == {key: record[key] for key in same}
        assert samples_of(tmp_path / "parts", name) == samples_of(tmp_path / "whole", name)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("has_begun", [False, True])
def test_an_interrupted_run_says_what_goes_on_with_it(
    dmax: Dmax,
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overwrite: bool,
    has_begun: bool,
) -> None:
    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"dmax.reproduce.run.{'opened' if has_begun else 'get_task'}", dies)
    words = ["--model", f"dmax-math={checkpoint}", "--data", f"gsm8k={DATA['gsm8k']}"]
    words += ["--only", "dmax-math", "--only", "gsm8k", "--trial", "--output", tmp_path / "a"]
    result = dmax("reproduce", "table1", *words, *(["--overwrite"] if overwrite else []))
    assert result.code == 130, result.err
    said = " ".join(result.err.split())
    if overwrite and not has_begun:
        assert "was changed, and the same command starts over" in said
    else:
        command = "the same command without --overwrite" if overwrite else "the same command"
        assert f", and {command} goes on" in said


def test_a_cell_that_was_decoded_is_only_scored(
    a_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = a_plan("dmax-math", "gsm8k")
    before = run(plan, tmp_path)
    cell = tmp_path / "cells" / "dmax-math.gsm8k.json"
    cell.unlink()
    monkeypatch.setattr("dmax.llm.LLM", None)  # no model can be opened
    assert run(plan, tmp_path) == before


def test_what_was_decoded_is_scored_though_its_model_is_gone(
    checkpoint: str, a_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(a_plan("dmax-math", "gsm8k", limit=1), tmp_path)
    (tmp_path / "cells" / "dmax-math.gsm8k.json").unlink()

    def gone(*args: object, **options: object) -> None:
        raise InputError("the checkpoint is gone")

    monkeypatch.setattr("dmax.llm.LLM", gone)
    records = run(a_plan("dmax-math", "gsm8k", "asdiv", limit=1), tmp_path)
    assert records["dmax-math.gsm8k"]["status"] == "measured"
    assert records["dmax-math.asdiv"]["status"] == CANNOT_RUN
    assert records["dmax-math.asdiv"]["reason"] == "the checkpoint is gone"


def test_a_file_of_rows_that_is_wrong_leaves_no_folder(a_plan: MakePlan, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "How many?"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="`answer` is missing"):
        run(a_plan("gsm8k", "dmax-math", data={"gsm8k": str(rows)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_later_run_adds_cells(a_plan: MakePlan, tmp_path: Path) -> None:
    assert run(a_plan("dmax-math", "gsm8k", limit=2), tmp_path).keys() == {"dmax-math.gsm8k"}
    both = run(a_plan("dmax-math", "asdiv", limit=2), tmp_path)
    assert both.keys() == {"dmax-math.gsm8k", "dmax-math.asdiv"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 2}, "holds a table of other settings: limit was 1 and is 2"),
        ({"max_new_tokens": 39}, "max_new_tokens was 40 and is 39"),
        ({"table": "table4"}, "table was 'table1' and is 'table4'"),
        ({"models": {"dmax-math": "tiny-base"}}, ", not tiny-base"),
        ({"data": {"gsm8k": DATA["asdiv"]}}, f"with data {DATA['gsm8k']}, not {DATA['asdiv']}"),
    ],
)
def test_a_folder_of_something_else_is_refused(
    a_plan: MakePlan, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    plan = a_plan("gsm8k", "dmax-math", limit=1)
    held = run(plan, tmp_path)
    only = ("gsm8k",) if "table" in changes else ("gsm8k", "dmax-math")
    other = a_plan(*only, **({"limit": 1} | changes))
    with pytest.raises(InputError, match="start anew with --overwrite") as error:
        run(other, tmp_path)
    assert message in error.value.message
    assert records_of(plan, tmp_path) == held


def test_overwrite_forgets_what_the_folder_holds(a_plan: MakePlan, tmp_path: Path) -> None:
    run(a_plan("gsm8k", "dmax-math", limit=1), tmp_path)
    kept = tmp_path / "cells" / "notes.txt"
    kept.write_text("mine", encoding="utf-8")
    records = run(a_plan("asdiv", "dmax-math", limit=2), tmp_path, overwrite=True)
    assert records.keys() == {"dmax-math.asdiv"}
    assert kept.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [("report.md", "no table wrote it"), ("reproduce.json", "was not written by this command")],
)
def test_files_of_others_stay(a_plan: MakePlan, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        run(a_plan("gsm8k", "dmax-math", limit=1), tmp_path)
    assert (tmp_path / name).read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("cells/dmax-math.gsm8k.json", "[]", "is not a cell of this table"),
        ("cells/dmax-math.gsm8k.json", '{"cell": "dmax-math.gsm8k"}', "is not a cell of this"),
        ("decoded/dmax-math.gsm8k.json", "{}", "are not an evaluation of dmax"),
        ("decoded/dmax-math.gsm8k.samples.jsonl", '{"prompt": 1}\n', "are not an evaluation of"),
    ],
)
def test_damaged_records_are_one_sentence(
    a_plan: MakePlan, tmp_path: Path, name: str, text: str, message: str
) -> None:
    plan = a_plan("gsm8k", "dmax-math", limit=1)
    run(plan, tmp_path)
    if name.startswith("decoded"):
        (tmp_path / "cells" / "dmax-math.gsm8k.json").unlink()
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        run(plan, tmp_path)


# --- what cannot be measured ----------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_reached_says_so_and_the_others_are_measured(
    checkpoint: str,
    a_plan: MakePlan,
    tmp_path: Path,
) -> None:
    models = {"dmax-math": checkpoint}
    records = run(a_plan("gsm8k", models=models, limit=1), tmp_path)
    statuses = {name: record["status"] for name, record in records.items()}
    assert statuses == {
        **dict.fromkeys(("base.gsm8k", "hierarchical.gsm8k", "dparallel.gsm8k"), CANNOT_RUN),
        "uniform.gsm8k": NOT_AVAILABLE,
        "dmax-math.gsm8k": "measured",
    }
    assert "nor reachable on the hub" in records["base.gsm8k"]["reason"]
    later = run(a_plan("gsm8k", limit=1), tmp_path)  # what could not be measured is tried again
    assert later["base.gsm8k"]["status"] == "measured"


def test_nothing_measured_ends_with_the_reason(dmax: Dmax, tmp_path: Path) -> None:
    words = ("--only", "base", "--only", "gsm8k", "--data", f"gsm8k={DATA['gsm8k']}")
    result = dmax("reproduce", "table1", *words, "--output", tmp_path)
    assert result.code == 2
    assert "no cell could be measured: `inclusionAI/LLaDA2.0-mini` is neither" in result.err
    assert "cannot run here: `inclusionAI/LLaDA2.0-mini` is neither" in result.out


class FakeVllm(LocalCompleter):
    """Stands for vLLM: the model of this process behind its name."""

    given: dict[str, Any] = {}
    num_closed = 0

    def __init__(self, model: str, **options: Any) -> None:
        FakeVllm.given = options
        if "max_model_length" in options:
            raise TypeError("unexpected keyword argument 'max_model_length'")
        super().__init__(LLM(model, dtype="float32", max_batch_size=options["max_batch_size"]))

    def close(self) -> None:
        FakeVllm.num_closed += 1


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("max_num_seqs=4", "`max_num_seqs` is no further option of an engine"),
        ("tensor_parallel_size=0", "`tensor_parallel_size` must be a whole number"),
        ("max_model_length=64", "vLLM does not take these options: "),
    ],
)
def test_an_option_that_an_engine_does_not_take_is_one_sentence(
    dmax: Dmax,
    tmp_path: Path,
    option: str,
    message: str,
) -> None:
    words = ["--engine", "vllm", "--engine-option", option, "--only", "gsm8k", "--output", tmp_path]
    words += ["--only", "dmax-math", "--model", "dmax-math=tiny-dmax"]
    result = dmax("reproduce", "table1", *words, "--data", f"gsm8k={DATA['gsm8k']}")
    assert result.code == 2
    assert message in result.err and "bug" not in result.err


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed vLLM with the completer that stands for it."""
    module = types.ModuleType("stand_in_for_vllm")
    module.FakeVllm = FakeVllm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stand_in_for_vllm", module)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(engines.COMPLETERS, "vllm", "stand_in_for_vllm:FakeVllm")
    monkeypatch.setattr(FakeVllm, "num_closed", 0)


@pytest.mark.usefixtures("vllm")
def test_another_engine_is_opened_by_name_and_closed(a_plan: MakePlan, tmp_path: Path) -> None:
    engine = EngineChoice("vllm", 2, options=(("max_model_len", 512),))
    plan = replace(a_plan("gsm8k", "dmax-math", limit=2), engine=engine)
    record = run(plan, tmp_path)["dmax-math.gsm8k"]
    assert record["status"] == "measured"
    assert FakeVllm.given == {
        "dtype": "auto",
        "max_batch_size": 2,
        "tensor_parallel_size": 1,
        "max_model_len": 512,
    }
    assert FakeVllm.num_closed == 1


@pytest.mark.usefixtures("vllm")
def test_a_strategy_that_an_engine_does_not_run_says_so(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = (FIXTURES.parents[2] / "src/dmax/reproduce/tables/table4.yaml").read_text("utf-8")
    file.write_text(
        text.replace(
            "{strategy: spd, threshold: 0.5, options: {stop_on_confidence: false}}",
            "{strategy: lopa, threshold: 0.5}",
        ),
        encoding="utf-8",
    )
    plan = Plan(
        load_table(str(file)),
        EngineChoice("vllm", 2),
        models={"dmax-math": "tiny-dmax"},
        data={"gsm8k": DATA["gsm8k"]},
        only=["gsm8k", "math-consistency"],
        limit=1,
    )
    record = run(plan, tmp_path / "out")["math-consistency.gsm8k"]
    assert record["status"] == CANNOT_RUN
    assert record["reason"] == (
        "strategy `lopa` needs 2 branches of a block, and vLLM computes one"
    )


@pytest.mark.parametrize(("engine", "label"), [("vllm", "vLLM"), ("sglang", "SGLang")])
def test_a_missing_engine_is_one_sentence(
    dmax: Dmax,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    label: str,
) -> None:
    monkeypatch.setattr("dmax.extras.has", lambda module: module != engine)
    result = dmax("reproduce", "table1", "--engine", engine)
    assert result.code == 2
    assert f"measuring with {label} needs the package `{engine}`" in result.err
    assert f"[{engine}]" in result.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["table1", "--only", "gsm9k"], "--only names 'gsm9k'; this table has base, hierarchical"),
        (["table1", "--model", "dmax=tiny-dmax"], "--model names 'dmax'; this table has llada2"),
        (["table1", "--data", "gsm8k"], "`--data` must be NAME=PATH, got 'gsm8k'"),
        (["table1", "--data", "x=y"], "--data names 'x'; this table has gsm8k, math500"),
        (["table1", "--model", "uniform=a", "--model", "uniform=b"], "names 'uniform' twice"),
        (["table1", "--model", "dmax-math=nowhere/here"], "nowhere/here"),
        (["table1", "--engine", "trt"], "unknown engine 'trt'; choose from dmax, vllm, sglang"),
        (["table1", "--only", "dmax-coder", "--only", "gsm8k"], "no cell of `table1` is in all of"),
        (["table2"], "unknown table 'table2'"),
        (["table2.yaml"], "table 'table2.yaml' is not a file"),
        (["table1", "--engine-option", "a=1"], "dmax's own engine has no further options, got a"),
        (["table1", "--engine-option", "a"], "`--engine-option` must be NAME=VALUE, got 'a'"),
        ([], "no table named"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(
    dmax: Dmax,
    tmp_path: Path,
    words: list[str],
    message: str,
) -> None:
    result = dmax("reproduce", *words, "--output", tmp_path / "out")
    assert result.code == 2
    assert message in result.err and "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


# --- throughput -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(
    ("engine", "num_gpus", "message"),
    [
        ("dmax", 8, "over 2 GPUs at batch size 1, not with dmax"),
        (
            "vllm",
            0,
            "`throughput` is measured with vLLM over 2 GPUs at batch size 1; this machine has 0",
        ),
        ("vllm", 1, "this machine has 1"),
        ("vllm --batch-size 8", 8, "over 2 GPUs at batch size 1, not 8"),
        ("vllm --engine-option tensor_parallel_size=1", 8, "at batch size 1, not over 1"),
    ],
)
def test_nothing_else_runs_in_the_name_of_throughput(
    dmax: Dmax,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    engine: str,
    num_gpus: int,
    message: str,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    words = ["--engine", *engine.split(), "--model", "dmax-math=tiny-dmax"]
    words += ["--output", str(tmp_path / "out")]
    result = dmax("reproduce", "throughput", *words)
    assert result.code == 2
    assert message in result.err and "--trial" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("vllm")
def test_throughput_asks_for_two_gpus_and_batch_one(
    a_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    engine = EngineChoice("vllm", batch_size=1, tensor_parallel=2)
    plan = replace(a_plan("gsm8k", table="throughput", limit=1))
    record = run(replace(plan, engine=engine), tmp_path)["dmax-math.gsm8k"]
    assert FakeVllm.given == {"dtype": "auto", "max_batch_size": 1, "tensor_parallel_size": 2}
    assert hardware(replace(plan, engine=engine), {"gpu": "H200", "engine": "vLLM 0.32"}) == (
        "2 × H200, vLLM 0.32"
    )
    assert record["published"]["tps"] == 1258


def test_a_trial_of_throughput_says_that_it_is_one(dmax: Dmax, tmp_path: Path) -> None:
    words = ["--trial", "--engine", "dmax", "--limit", 1, "--max-new-tokens", 40]
    words += ["--only", "gsm8k", "--model", "dmax-math=tiny-dmax", "--output", tmp_path]
    result = dmax("reproduce", "throughput", *words, "--data", f"gsm8k={DATA['gsm8k']}")
    assert result.code == 0, result.err
    assert "not on what the table is about" in result.out
    assert "mean of all cells: 1 of 6 are measured; 1,338 tokens/s published" in result.out
    assert "(trial)" in result.out


# --- pages ----------------------------------------------------------------------------------------


class Rows(HTMLParser):
    """The texts of the cells of a page's table."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._is_cell = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        self._is_cell = tag == "td"

    def handle_data(self, data: str) -> None:
        if self._is_cell:
            self.rows[-1].append(data)
            self._is_cell = False


def test_the_pages_show_every_cell_and_never_a_blank(
    checkpoint: str, a_plan: MakePlan, tmp_path: Path
) -> None:
    plan = a_plan("gsm8k", "dmax-math", models={"dmax-math": checkpoint}, limit=3)
    records = run(plan, tmp_path)
    text = markdown(plan.table, records)
    grid = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    head, _, *rows = grid
    assert len(rows) == 30
    assert {len(row) for row in grid} == {len(head)}
    assert all(cell for row in rows for cell in row)
    page = Rows()
    page.feed(html(plan.table, records))
    assert [row for row in page.rows if row] == rows
    by_name = {(row[0], row[1]): row for row in rows}
    score = records["dmax-math.gsm8k"]["scores"]["strict"]
    shown = by_name["GSM8K", "DMax-Math"]
    assert f"({score['correct']}/3; " in shown[4]
    assert shown[5].endswith("(trial)")
    assert by_name["ASDIV", "Uniform Diffusion Training"][3:6] == [NOT_AVAILABLE] * 3
    assert by_name["MATH500", "DMax-Math"][3:6] == [NOT_RUN] * 3
    assert by_name["MATH500", "DMax-Math"][2] == "75.4"
    replaced = f"measured with {checkpoint}, in place of Zigeng/DMax-Math-16B"
    assert f"DMax-Math on GSM8K was {replaced}" in text
    assert "DMax-Math on GSM8K is a trial: 3 of 1,319 examples" in text
    assert all(len(line) < 200 for line in lines(plan.table, records))


def test_list_shows_what_there_is(dmax: Dmax) -> None:
    result = dmax("reproduce", "--list")
    assert result.code == 0
    for name in ("table1: ", "throughput: ", "table3: ", "table4: "):
        assert f"\n{name}" in f"\n{result.out}"
    assert "(6 cells, needs vllm and 2 GPUs)" in result.out
    assert "uniform (not available)" in result.out
    [table, *_] = json.loads(dmax("reproduce", "--list", "--json").out)
    assert (table["name"], table["cells"]) == ("table1", 30)
