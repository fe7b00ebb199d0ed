"""The command line: what a program may read, bad input as one sentence, help with an example."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from fake_server import Server
from test_llm import CONFIG, TEXTS, bare_folder_fixture, folder_fixture  # noqa: F401  (fixtures)
from typer.main import get_command

from dmax import LLM, cli
from dmax.records.sources import read_conversations
from dmax.tiny import BUNDLED

COMMANDS = sorted(get_command(cli.app).commands)  # type: ignore[attr-defined]
SMALL = ("--max-new-tokens", "8")


@dataclass(frozen=True, slots=True)
class Result:
    code: int
    out: str
    err: str


Dmax = Callable[..., Result]


@pytest.fixture(name="dmax")
def dmax_fixture(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Dmax:
    """Runs `dmax WORDS` as the installed command does, in this process."""

    def run(*words: object, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "argv", ["dmax", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setenv("COLUMNS", "200")  # else tables break their lines
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = (re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text) for text in capsys.readouterr())
        return Result(code, out, err)

    return run


def one_object(result: Result) -> Any:
    assert result.code == 0, result.err
    assert result.out.count("\n") == 1 and result.out.endswith("\n"), result.out
    return json.loads(result.out)


# --- what works -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(dmax: Dmax, command: str) -> None:
    result = dmax(command, "--help")
    assert result.code == 0
    assert f"Example: dmax {command}" in re.sub(r"[\s│]+", " ", result.out)
    assert dmax("--help").out.count(f" {command} ") >= 1


def test_generate_prints_texts_on_stdout_and_costs_on_stderr(dmax: Dmax, folder: Path) -> None:
    words = ("generate", "--model", folder, "--dtype", "float32", *SMALL)
    result = dmax(*words, *TEXTS)
    assert result.code == 0
    assert result.err.count("tokens in") == len(TEXTS)
    piped = dmax(*words, stdin=TEXTS[0] + "\n")
    assert result.out.startswith(piped.out)


def test_generate_takes_a_folder_of_adapters(dmax: Dmax, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from dmax.adapters import add_adapters
    from dmax.checkpoint import load_checkpoint, save_checkpoint

    base = load_checkpoint("tiny-base", dtype="float32", device="cpu")
    adapted = add_adapters(base.model, peft.LoraConfig(r=2), "tiny-base")
    save_checkpoint(adapted, base.tokenizer, tmp_path / "adapters", base.special_ids)
    words = ("generate", "Tom has 3 mugs.", *SMALL, "--json", "--device", "cpu", "--model")
    expected, found = (
        one_object(dmax(*words, model)) for model in ("tiny-base", tmp_path / "adapters")
    )
    assert found[0]["text"] == expected[0]["text"]  # new adapters add nothing


def test_generate_json(dmax: Dmax, folder: Path) -> None:
    records = one_object(dmax("generate", "--model", folder, "--json", *SMALL, *TEXTS))
    assert len(records) == len(TEXTS)
    for record in records:
        assert record.keys() >= {
            "text",
            "token_ids",
            "finish_reason",
            "num_forwards",
            "num_prefill_forwards",
        }
        assert record["tokens_per_forward"] == len(record["token_ids"]) / record["num_forwards"]
    assert records[:1] == one_object(dmax("generate", "-m", folder, "--json", *SMALL, TEXTS[0]))


def test_sampling_repeats_with_its_seed(dmax: Dmax, folder: Path) -> None:
    words = ("generate", "-m", folder, "--json", *SMALL, "--temperature", "1", "Hi", "--seed")
    assert one_object(dmax(*words, 1)) == one_object(dmax(*words, 1)) != one_object(dmax(*words, 2))


def test_a_model_that_names_no_decoding_costs_one_line_on_stderr(dmax: Dmax, folder: Path) -> None:
    words = ("generate", "-m", folder, *SMALL, *TEXTS)
    fallback = "does not say which decoding it was trained for"
    for result in (dmax(*words), dmax(*words, "--json")):
        assert fallback not in result.out
        (line,) = [line for line in result.err.splitlines() if fallback in line]
        assert line.startswith(f"warning: {folder}") and "`threshold`" in line
    assert len(one_object(result)) == len(TEXTS)
    assert fallback not in dmax(*words, "--strategy", "threshold").err


def test_eval_json(dmax: Dmax, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "result.json"
    words = (
        "eval",
        "-m",
        folder,
        "--limit",
        "3",
        "--strategy",
        "threshold",
        "--threshold",
        "0.3",
        *SMALL,
    )
    record = one_object(dmax(*words, "--json", "--output", output))
    promised = (
        "accuracy correct total tpf generated_tokens num_forwards num_prefill_forwards "
        "num_commit_forwards num_positions tokens_per_second".split()
    )
    assert record.keys() >= set(promised)
    assert record["total"] == 3
    assert record["tpf"] == record["generated_tokens"] / record["num_forwards"]
    assert record["model"] == str(folder)
    assert (record["params"]["strategy"], record["params"]["threshold"]) == ("threshold", 0.3)
    assert json.loads(output.read_text()) == record
    samples = [
        json.loads(line) for line in output.with_suffix(".samples.jsonl").read_text().splitlines()
    ]
    assert sum(sample["generated_tokens"] for sample in samples) == record["generated_tokens"]


def test_decoding_is_the_checkpoints_own_unless_asked(
    dmax: Dmax, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ("eval", "-m", folder, "--limit", "1", "--json", *SMALL)
    assert one_object(dmax(*words))["params"]["strategy"] == "threshold"
    (record,) = caplog.records
    assert "does not say which decoding it was trained for" in record.getMessage()
    caplog.clear()
    spd = one_object(dmax(*words, "--strategy", "spd", "--option", "soft_inputs=false"))
    assert spd["params"]["strategy"] == "spd"
    assert "soft_inputs=False" in spd["decoding"]
    assert caplog.records == []


def test_eval_and_sweep_over_a_file_of_rows(dmax: Dmax, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data, other, output = (
        tmp_path / "rows.jsonl",
        tmp_path / "other.jsonl",
        tmp_path / "result.json",
    )
    rows = [
        {"question": f"Tom has {n} apples. How many?", "answer": f"#### {n}"} for n in (3, 4, 5)
    ]
    for path in (data, other):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("-m", folder, "--task", "gsm8k", "--data", data, "--limit", "8", *SMALL)
    record = one_object(dmax("eval", *words, "--json", "--output", output))
    assert (record["task"], record["limit"], record["total"]) == ("gsm8k", 8, 3)
    samples = [
        json.loads(line) for line in output.with_suffix(".samples.jsonl").read_text().splitlines()
    ]
    assert [sample["expected"] for sample in samples] == ["3", "4", "5"]
    assert record["correct"] == sum(sample["is_correct"] for sample in samples)
    too_long = dmax(
        "eval", *words[: -len(SMALL)], "--json"
    )  # 2,048 tokens, as the task usually takes
    assert_refused(too_long, "the model has 512", "hint: ", "--max-new-tokens")
    sweep = ("sweep", "-o", tmp_path / "s", "--strategies", "threshold", "--thresholds", "0.5")
    assert one_object(dmax(*sweep, *words, "--json"))["data"] == str(data)
    assert_refused(dmax(*sweep, *words, "--data", other), "holds a sweep of", "other.jsonl")


def test_rows_that_are_refused_before_a_model_is_opened(dmax: Dmax, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "Why?"}\n')
    for words in (("eval", "-m", "no/such"), ("sweep", "-m", "no/such", "-o", tmp_path / "s")):
        assert_refused(
            dmax(*words, "--task", "gsm8k", "--data", data), f"{data}:1: `answer` is missing"
        )
        assert_refused(
            dmax(*words, "--data", data),
            "'word_problems' makes its own examples",
            "leave out --data",
        )


def test_eval_goes_on_and_keeps_what_is_finished(
    dmax: Dmax, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("eval", "-m", folder, "--limit", "5", "--batch-size", "1", "--json", *SMALL)
    whole = one_object(dmax(*words, "-o", tmp_path / "whole.json"))
    output, generate, calls = tmp_path / "a.json", LLM.generate, list[int]()

    def dies(self: LLM, prompts: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, prompts, *args, **options)

    monkeypatch.setattr(LLM, "generate", dies)
    assert dmax(*words, "-o", output).code != 0
    assert calls == [4, 1]
    monkeypatch.setattr(LLM, "generate", generate)
    assert_refused(
        dmax(*words[:-1], "9", "-o", output), "params.max_new_tokens was 8 and is 9", "--overwrite"
    )
    result = dmax(*words, "-o", output)
    assert "going on with an interrupted run: 4 samples are finished already" in result.err
    record = one_object(result)
    own = ("seconds", "tokens_per_second", "environment")
    assert {k: v for k, v in record.items() if k not in own} == {
        k: v for k, v in whole.items() if k not in own
    }
    assert (
        output.with_suffix(".samples.jsonl").read_bytes()
        == (tmp_path / "whole.samples.jsonl").read_bytes()
    )
    for limit in ("5", "6"):
        again = dmax("eval", "-m", folder, "--limit", limit, *SMALL, "-o", output)
        assert_refused(again, f"{output} holds the results of a finished run", "--overwrite")
    assert json.loads(output.read_text()) == record
    assert dmax("eval", "-m", folder, "--limit", "1", *SMALL, "-o", output, "--overwrite").code == 0
    assert json.loads(output.read_text())["total"] == 1


def test_sweep_writes_a_record_plots_and_a_page(dmax: Dmax, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = (
        "sweep",
        "-m",
        folder,
        "-o",
        tmp_path / "s",
        "--strategies",
        "spd, llada",
        "--thresholds",
        "0:1:0.5",
    )
    record = one_object(dmax(*words, "--limit", "2", *SMALL, "--json"))
    assert record == json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert {(p["strategy"], p["value"]) for p in record["points"]} >= {
        ("spd", 0.0),
        ("spd", 0.5),
        ("llada", 32),
    }
    assert {file.name for file in (tmp_path / "s").iterdir()} == {
        "sweep.json",
        "plot.svg",
        "plot.png",
        "report.html",
    }
    again = dmax(*words, "--limit", "2", *SMALL)
    assert again.out == f"{tmp_path / 's' / 'report.html'}\n"
    assert_refused(dmax(*words, "--limit", "3", *SMALL), "holds a sweep of")
    assert_refused(
        dmax("sweep", "-m", folder, "-o", tmp_path / "t", "--thresholds", "x"),
        "cannot read the grid",
    )


def test_eval_in_words(dmax: Dmax, folder: Path) -> None:
    result = dmax("eval", "-m", folder, "--limit", "2", *SMALL)
    assert result.code == 0
    assert [line.split()[0] for line in result.out.splitlines()] == ["accuracy", "TPF", "speed"]


def test_distill_json_and_going_on(dmax: Dmax, folder: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "responses.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    words = ("distill", "-m", folder, "--prompts", prompts, "--output", output, *SMALL)
    record = one_object(dmax(*words, "--json"))
    assert (record["output"], record["prompts"]) == (str(output), len(TEXTS))
    assert record["kept"] + sum(record["dropped"].values()) == len(TEXTS)
    assert record["kept"] == output.read_text().count("\n")
    assert record["tokens_per_second"] == record["tokens"] / record["seconds"] > 0
    again = one_object(dmax(*words, "--json"))
    assert again == record | {"seconds": again["seconds"], "tokens_per_second": 0}
    assert f"{record['kept']} responses, " in dmax(*words).out
    if record["kept"]:
        assert len(list(read_conversations(output))) == record["kept"]


def test_paths_are_no_texts_in_any_release_of_typer(folder: Path, tmp_path: Path) -> None:
    """Before 0.25 the context of a command holds paths as they were typed."""
    command: Any = get_command(cli.app)
    output = tmp_path / "responses.jsonl"
    words = ["--model", str(folder), "--num", "1", "--output", str(output)]
    with command.commands["distill"].make_context("distill", words) as context:
        context.params = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in context.params.items()
        }
        assert context.params["output"] == str(output)
        cli.distill(context, output, model=str(folder), num=1)
    assert output.is_file()


def test_distill_says_what_was_dropped_and_how_fast_it_was(
    dmax: Dmax, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmax.cli.terminal.PERIOD", 0.0)
    rows = [
        {"question": "Tom has 3 apples. How many?", "answer": "He has 3.\n#### 3"},
        {"question": "Ann has 4 mugs. How many?", "answer": "She has 4.\n#### 5"},
    ]
    data, output = tmp_path / "train.jsonl", tmp_path / "shards"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("distill", "-m", "tiny-base", "--task", "gsm8k", "--data", data, "--filter-score")
    words += ("--max-new-tokens", "32", "--block-length", "16", "--dtype", "float32")
    result = dmax(*words, "--shard-size", 1, "-o", output)
    assert re.search(r"0 responses, 2 dropped \(2 \w+\); \d+ tokens, \d+ tokens/s; TPF", result.out)
    assert re.search(r"distilling: 2 of 2, \d+ tokens/s, 0:00:00 left", result.err)
    manifest = json.loads((output / "manifest.json").read_text())
    assert (manifest["filters"]["scorer"], manifest["params"]["block_length"]) == ("gsm8k", 16)


def test_distill_divides_the_prompts(dmax: Dmax, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "shards"
    words = ("distill", "-m", folder, "--num", 5, "--shard-size", 2, "-o", output, *SMALL, "--json")
    parts = [one_object(dmax(*words, "--part", f"{index}/2")) for index in range(2)]
    assert [part["prompts"] for part in parts] == [3, 2]


def test_distill_asks_a_server(dmax: Dmax, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    with Server() as server:
        words = ("distill", "--endpoint", server.url, "--num", 3, "-o", tmp_path / "a.jsonl")
        record = one_object(dmax(*words, "--option", "top_p=0.5", "--json"))
    assert (record["kept"], record["dropped"], record["tpf"]) == (3, {}, None)
    assert {body["top_p"] for body in server.bodies} == {0.5}


def test_distill_takes_training_problems(dmax: Dmax, folder: Path, tmp_path: Path) -> None:
    words = (
        "distill",
        "-m",
        folder,
        "--num",
        "2",
        "-o",
        tmp_path / "responses.jsonl",
        *SMALL,
        "--json",
    )
    assert one_object(dmax(*words))["prompts"] == 2


def write_recipe(folder: Path, **changes: Any) -> Path:
    training = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "seed": 1,
    }
    recipe = {
        "output_dir": str(folder / "out"),
        "model": {"config": CONFIG, "experts_implementation": "dense_mm"},
        "data": {"problems": 4},
        "training": training | {"logging_steps": 1},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes, sort_keys=False))
    return path


def test_train_json(dmax: Dmax, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    result = dmax("train", write_recipe(tmp_path), "--max-steps", "1", "--json")
    assert one_object(result) == {"checkpoint": str(tmp_path / "out")}
    assert json.loads((tmp_path / "out" / "dmax.json").read_text())["steps"] == 1
    again = dmax("train", tmp_path / "recipe.yaml", "--max-steps", "1", "--json")
    assert one_object(again) == one_object(result) and "already finished: " in again.err
    assert_refused(
        dmax("train", tmp_path / "recipe.yaml"), "differs in `training.max_steps`", "--fresh"
    )


def test_a_rank_that_is_done_leaves_the_others(
    dmax: Dmax, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")

    def train_in_a_group(*_: object, **__: object) -> Path:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return tmp_path

    monkeypatch.setattr("dmax.recipe.run.run_recipe", train_in_a_group)
    try:
        assert dmax("train", write_recipe(tmp_path)).code == 0
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_demo(dmax: Dmax, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmax.hub.bundled", lambda name: folder if name in BUNDLED else None)
    monkeypatch.setattr("dmax.demo.NUM_PROBLEMS", 2)
    monkeypatch.setattr("dmax.tasks.word_problems.WordProblems.max_new_tokens", 8)
    rows = one_object(dmax("demo", "--json"))["rows"]
    models = ["tiny-base", "tiny-base", "tiny-dmax"]
    assert [(row["model"], row["total"]) for row in rows] == [(name, 2) for name in models]
    assert all(row.keys() >= {"label", "accuracy", "tpf", "tokens_per_second"} for row in rows)
    shown = dmax("demo")
    assert shown.code == 0
    assert all(row["label"] in shown.out for row in rows)


# --- what does not --------------------------------------------------------------------------------


def assert_refused(result: Result, *parts: str) -> None:
    assert result.code == 2
    assert result.out == ""
    said = result.err[result.err.index("error: ") :]  # bars of loading may come before it
    sentence, _, hint = said.strip().partition("\n\n")
    assert "\n" not in sentence
    assert hint == "" or (hint.startswith("hint: ") and "\n" not in hint)
    for part in parts:
        assert part in said


def test_an_unknown_model(dmax: Dmax, tmp_path: Path) -> None:
    for words in (("generate", "Hi"), ("eval",), ("distill", "-o", tmp_path / "a.jsonl")):
        assert_refused(dmax(*words, "--model", "no/such-model"), "`no/such-model`", *BUNDLED)
    assert_refused(dmax("eval", "-m", tmp_path), "config.json")
    assert_refused(
        dmax("generate", "Hi", "--model", ""), "the name of the model is empty", *BUNDLED
    )


@pytest.mark.parametrize("command", ["generate", "eval", "distill"])
def test_an_unknown_strategy(dmax: Dmax, tmp_path: Path, command: str) -> None:
    words = {"generate": ["Hi"], "eval": [], "distill": ["-o", tmp_path / "a.jsonl"]}[command]
    result = dmax(command, *words, "-m", "not-looked-for-yet", "--strategy", "spdd")
    assert_refused(result, "unknown strategy 'spdd'; choose from auto, ", "did you mean `spd`?")
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_an_unknown_task(dmax: Dmax, folder: Path) -> None:
    assert_refused(
        dmax("eval", "-m", folder, "--task", "word_problem"), "'word_problem'; choose from "
    )


@pytest.mark.parametrize("command", ["generate", "eval", "distill"])
@pytest.mark.parametrize("threshold", ["1.5", "-0.1", "nan"])
def test_a_threshold_that_is_no_probability(
    dmax: Dmax, tmp_path: Path, command: str, threshold: str
) -> None:
    words = {"generate": ["Hi"], "eval": [], "distill": ["-o", tmp_path / "a.jsonl"]}[command]
    result = dmax(command, *words, "--threshold", threshold)
    assert_refused(result, f"`threshold` must be a number between 0 and 1, got {float(threshold)}")


@pytest.mark.parametrize("command", ["generate", "eval", "distill"])
@pytest.mark.parametrize("count", ["0", "-3"])
def test_no_new_tokens(dmax: Dmax, folder: Path, tmp_path: Path, command: str, count: str) -> None:
    words = {
        "generate": ["Hi"],
        "eval": ["--limit", "1"],
        "distill": ["-o", tmp_path / "a.jsonl", "--num", "1"],
    }
    result = dmax(command, *words[command], "-m", folder, "--max-new-tokens", count)
    assert_refused(result, "`max_new_tokens` must be a whole number of at least 1")


def test_an_output_that_cannot_be_written(dmax: Dmax, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for command in ("eval", "distill", "sweep"):
        result = dmax(command, "-m", folder, "--output", tmp_path / "file" / "a.json", *SMALL)
        assert_refused(result, "cannot write", "choose another output")


@pytest.mark.parametrize("command", ["eval", "distill"])
def test_a_folder_is_no_output(dmax: Dmax, folder: Path, tmp_path: Path, command: str) -> None:
    assert_refused(
        dmax(command, "-m", folder, "--output", tmp_path, *SMALL), f"cannot write {tmp_path}"
    )


def test_an_output_is_tried_before_the_model_is_loaded(dmax: Dmax, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for command in ("eval", "distill", "sweep"):
        assert_refused(
            dmax(command, "-m", "no/such-model", "-o", tmp_path / "file" / "a.json"), "cannot write"
        )


def test_names_of_outputs_that_cannot_be(dmax: Dmax, folder: Path) -> None:
    for name, part in (("", "it is a folder"), ("x" * 300, "too long")):
        assert_refused(dmax("eval", "-m", folder, "--output", name, *SMALL), "cannot write", part)


def test_a_sweep_names_an_unknown_model_before_it_measures_the_first(
    dmax: Dmax, folder: Path, tmp_path: Path
) -> None:
    words = (
        "sweep",
        "-m",
        folder,
        "-m",
        "no/such-model",
        "--limit",
        1,
        "-o",
        tmp_path / "out",
        *SMALL,
    )
    assert_refused(dmax(*words), "`no/such-model`")
    assert not (tmp_path / "out").exists()


def test_a_sweep_without_new_tokens(dmax: Dmax, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = dmax("sweep", "-m", folder, "-o", tmp_path / "out", "--max-new-tokens", 0)
    assert_refused(result, "`max_new_tokens` must be a whole number of at least 1, got 0")


def test_a_missing_recipe(dmax: Dmax, tmp_path: Path) -> None:
    assert_refused(dmax("train", tmp_path / "no.yaml"), "no.yaml` is not a file", "see recipes/")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"trainig": {}}, ["recipe.yaml:", "unknown key `trainig`", "did you mean `training`?"]),
        (
            {"training": {"objektive": "oput"}},
            ["unknown key `training.objektive`", "did you mean `objective`?"],
        ),
        (
            {"training": {"objective": "opud"}},
            [
                "`objective` must be one of mdlm, uniform, oput, ",
                "got 'opud'",
                "did you mean `oput`?",
            ],
        ),
        ({"data": {"file": "nowhere.jsonl"}}, ["nowhere.jsonl` is not a file", "dmax distill"]),
        ({"model": {"path": "no/such-model"}}, ["`no/such-model`", *BUNDLED]),
        (
            {"training": {"eval_strategy": "steps"}, "eval": {"task": "sums"}},
            ["unknown task 'sums'; choose from "],
        ),
        ({"training": None}, ["`training`"]),
    ],
)
def test_a_bad_recipe(dmax: Dmax, tmp_path: Path, change: dict[str, Any], parts: list[str]) -> None:
    pytest.importorskip("accelerate")
    assert_refused(dmax("train", write_recipe(tmp_path, **change)), *parts)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model": None}, "`model`"),
        ({"training": {"learning_rate": "5e-4x"}}, "learning_rate"),
        ({"training": {"output_dir": "elsewhere"}}, "output_dir"),
        ({"training": {"max_steps": "many"}}, "max_steps"),
        ({"data": {"problems": "many"}}, "problems"),
        ({"data": {"problems": 4, "numbers": {"largst": 30}}}, "largst"),
        ({"model": {"config": {**CONFIG, "hiden_size": 16}}}, "hiden_size"),
        ({"output_dir": 3}, "output_dir"),
        ({3: "x"}, "3"),
    ],
)
def test_a_recipe_with_a_value_of_the_wrong_kind(
    dmax: Dmax, tmp_path: Path, change: dict[Any, Any], part: str
) -> None:
    pytest.importorskip("accelerate")
    path = write_recipe(tmp_path)
    recipe = yaml.safe_load(path.read_text())
    recipe["training"]["max_steps"] = 1
    path.write_text(yaml.safe_dump(recipe | change, sort_keys=False))
    assert_refused(dmax("train", path), part)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--concurrency", 8), ["`--concurrency` goes with --endpoint only"]),
        (
            ("--endpoint", "http://a", "-m", "b"),
            ["`--model` does not go with", "--option"],
        ),
        (("--endpoint", "http://a", "--compile"), ["`--compile` does not go with"]),
        (("--endpoint", "http://a", "--threshold", "0.9"), ["`--threshold` does not go with"]),
        (("--endpoint", "nowhere"), ["`--endpoint` must be an address"]),
        (("--part", "2/2"), ["`--part` must be INDEX/COUNT", "0/8"]),
        (("--prompts", "a.jsonl", "--task", "gsm8k"), ["`--prompts` and `--task`"]),
        (("--task", "gsm8k"), ["`--task gsm8k` needs --data", "training rows"]),
        (("--data", "a.jsonl"), ["`--data` needs --task"]),
        (("--max-repetition", "2"), ["`max_repetition` must be a number between 0 and 1"]),
        (("--max-length", "0"), ["`max_length` must be a whole number"]),
        (("--reader", "numnia"), ["`reader` must be one of numina", "numina"]),
    ],
)
def test_bad_options_of_distill(
    dmax: Dmax, tmp_path: Path, words: tuple[object, ...], parts: list[str]
) -> None:
    assert_refused(dmax("distill", "-o", tmp_path / "a.jsonl", *words), *parts)
    assert not list(tmp_path.iterdir())


def test_prompts_without_a_task_cannot_be_scored(dmax: Dmax, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "How many?"}\n')
    words = ("distill", "-o", tmp_path / "a.jsonl", "--prompts", prompts, "--filter-score")
    assert_refused(dmax(*words), "`--filter-score` needs a task", "--task NAME --data FILE")


def test_bad_prompts(dmax: Dmax, folder: Path, tmp_path: Path) -> None:
    words = ("distill", "-m", folder, "-o", tmp_path / "a.jsonl", "--prompts")
    assert_refused(dmax(*words, tmp_path / "no.jsonl"), "no.jsonl` is not a file")
    path = tmp_path / "prompts.jsonl"
    for content, part in (
        ("", "holds no record"),
        ("x\n", "prompts.jsonl:1: not a JSON object"),
        ('{"a": 1}\n', "prompts.jsonl:1: no prompt"),
    ):
        path.write_text(content)
        assert_refused(dmax(*words, path), part)
    assert [found.name for found in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize("count", ["abc", "0", "-1", "1.5", "9" * 5000])
def test_a_number_of_processes_that_is_none(
    dmax: Dmax, monkeypatch: pytest.MonkeyPatch, count: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    must = "WORLD_SIZE must be a whole number of at least 1, got"
    for words in (("--version",), ("generate", "Hi"), ("--debug", "eval")):
        assert dmax(*words).code == 2
    assert_refused(dmax("generate", "Hi"), must, "unset it")


@pytest.mark.parametrize("count", ["", "1", "01"])
def test_one_process_by_whatever_name(
    dmax: Dmax, monkeypatch: pytest.MonkeyPatch, count: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    result = dmax("--version")
    assert (result.code, result.err) == (0, "")
    assert os.environ.get("WORLD_SIZE", "1") == (count or "1")  # ranks.py reads it as a number


def test_other_bad_input(dmax: Dmax, folder: Path, bare_folder: Path) -> None:
    generate = ("generate", "-m", folder, "Hi")
    assert_refused(dmax("generate", "-m", folder, stdin=" \n"), "no prompt given")
    assert_refused(
        dmax("generate", "-m", folder, stdin="caf\udce9"), "not UTF-8 text"
    )  # as stdin has a stray byte
    assert_refused(dmax("generate", "-m", folder, "caf\udce9"), "not UTF-8 text")
    assert_refused(dmax("generate", "-m", bare_folder, "Hi"), "no tokenizer")
    assert_refused(
        dmax(*generate, "--dtype", "float61"), "unknown dtype 'float61'; choose from auto, float32"
    )
    assert_refused(
        dmax(*generate, "--device", "cdua"), "unknown device 'cdua'; choose from auto, cpu, cuda"
    )
    assert_refused(
        dmax(*generate, "--max-new-tokens", "600"), "the model has 512", "lower", "--max-new-tokens"
    )
    assert_refused(
        dmax(*generate, "--top-k", "0"), "`top_k` must be a whole number between 1 and 1024, got 0"
    )
    assert_refused(
        dmax(*generate, "--temperature", "-1"), "`temperature` must be a number between 0 and 1000"
    )


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["evaluate"], "evaluate"),
        (["eval", "--treshold", "0.5"], "--treshold"),
        (["eval", "--limit", "0"], "--limit"),
        (["eval", "--limit", "many"], "--limit"),
        (["distill"], "--output"),
        (["train"], "RECIPE"),
        (["train", "recipe.yaml", "--max-steps", "0"], "--max-steps"),
        (["demo", "x" * 10_000], "unexpected extra argument"),
    ],
)
def test_wrong_usage(dmax: Dmax, words: list[str], part: str) -> None:
    result = dmax(*words)
    assert (result.code, result.out) == (2, "")
    assert part.lower() in result.err.lower()
    assert len(result.err) < 500
