"""`dmax trace`: pages, raw traces, runs side by side, and bad input in a sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_cli import Dmax, dmax_fixture, one_object  # noqa: F401  (fixture)
from test_llm import folder_fixture  # noqa: F401  (fixture)

from dmax.trace import Trace

PROMPT = "Tom has 3 mugs."
SMALL = ("--model", "tiny-dmax", "--dtype", "float32", "--max-new-tokens", "32")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_page_is_written_and_named_on_stdout(dmax: Dmax) -> None:
    result = dmax("trace", PROMPT, *SMALL)
    assert (result.code, result.out) == (0, "trace.html\n")
    assert Path("trace.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert re.search(r"^tiny-dmax, spd: \d+ tokens in \d+ forwards", result.err, re.MULTILINE)


def test_the_options_of_generate_mean_the_same(dmax: Dmax) -> None:
    words = (PROMPT, *SMALL, "--json", "--strategy", "credit", "--option", "alpha=0.5")
    words = (*words, "--temperature", "0.7", "--seed", "3", "--stop", "7", "--ignore-eos")
    trace = one_object(dmax("trace", *words))
    [generated] = one_object(dmax("generate", *words))
    assert trace["output"]["token_ids"] == generated["token_ids"]
    assert trace["output"]["num_forwards"] == generated["num_forwards"]
    assert trace["params"]["options"] == {"alpha": 0.5}
    assert not Path("trace.html").exists()


def test_raw_traces_are_opened_again(dmax: Dmax) -> None:
    printed = one_object(dmax("trace", PROMPT, *SMALL, "--json", "-o", "run.json"))
    assert Trace.load("run.json").record == printed
    Path("played.json").write_text(json.dumps(printed))
    words = ("trace", "--open", "run.json", "--open", "played.json")
    assert one_object(dmax(*words, "--json")) == [printed, printed]
    assert dmax(*words, "-o", "new/both.html").out == "new/both.html\n"
    assert Path("new/both.html").is_file()


def test_a_comparison_differs_in_what_it_names(dmax: Dmax, folder: Path) -> None:
    more = (
        "strategy=threshold",
        "threshold=0.2,max_new_tokens=16",
        f"model={folder},strategy=credit,alpha=0.1",
    )
    words = [word for each in more for word in ("--compare", each)]
    first, other, lower, stranger = one_object(
        dmax("trace", PROMPT, *SMALL, "--strategy", "spd", "--threshold", "0.4", "--json", *words)
    )
    assert (first["params"]["strategy"], first["threshold"]) == ("spd", 0.4)
    assert (other["params"]["strategy"], other["threshold"]) == ("threshold", 0.95)
    assert (lower["params"]["strategy"], lower["threshold"]) == ("spd", 0.2)
    assert lower["params"]["max_new_tokens"] == 16
    assert (stranger["model"], stranger["params"]["options"]) == (str(folder), {"alpha": 0.1})
    assert {trace["prompt"] for trace in (first, other, lower, stranger)} == {PROMPT}


def test_the_prompt_may_come_from_stdin(dmax: Dmax) -> None:
    words = ("trace", *SMALL, "--json")
    piped = one_object(dmax(*words, stdin=PROMPT + "\n"))
    assert piped["prompt"] == PROMPT
    assert dmax(*words).err.endswith('hint: dmax trace "your question"\n')


@pytest.mark.parametrize("name", ["notes.html", "notes.json"])
def test_what_is_no_trace_is_not_replaced(dmax: Dmax, name: str) -> None:
    Path(name).write_text("my notes")
    result = dmax("trace", PROMPT, *SMALL, "-o", name)
    assert result.code == 2
    assert f"{name} exists and is no trace" in result.err
    assert Path(name).read_text() == "my notes"
    for _ in range(2):  # a trace may be replaced
        assert dmax("trace", PROMPT, *SMALL, "-o", f"my-{name}").code == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--compare", "threshold"), "`--compare` must be NAME=VALUE, got 'threshold'"),
        (("--compare", "strategy=spdd"), "unknown strategy 'spdd'"),
        (("--compare", "strategy=spd,threshold=3"), "`threshold` must be a number between"),
        (("--compare", "strategy=spd,alpha=3"), "strategy `spd` has no option `alpha`"),
        (("--compare", "model=none-such"), "none-such"),
        (("--compare", "seed=1") * 8, "at most 8 traces side by side, got 9"),
        (("--open", "run.json"), "neither a prompt nor --compare"),
        (("--output", "."), "it is a folder"),
        (("--threshold", "2"), "`threshold` must be"),
    ],
)
def test_bad_input_is_one_sentence(dmax: Dmax, words: tuple[str, ...], expected: str) -> None:
    result = dmax("trace", PROMPT, *SMALL, *words)
    assert result.code == 2
    assert expected in result.err
    assert not list(Path().iterdir())


def test_a_bad_file_is_one_sentence(dmax: Dmax) -> None:
    Path("run.json").write_text('{"format": "dmax-trace", "version": 9}')
    result = dmax("trace", "--open", "run.json")
    assert result.code == 2
    assert "run.json is a trace of version 9, and this dmax reads up to 1" in result.err
